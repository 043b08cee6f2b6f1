"""`inkwell gateway check FILE` of an access file."""

from pathlib import Path

import pytest

from services.gateway.check import check
from services.gateway.config import ConfigError


def test_an_access_file_is_told_by_its_rules(tmp_path: Path) -> None:
    path = tmp_path / "access.yaml"
    path.write_text(
        """
keys: [{name: scanner, sha256: %s}]
tokens: [{name: corp, issuer: i, audience: a, keys: jwks.json}]
rules:
  - {callers: [key/scanner], methods: [ocr/*], models: [pen-*], pools: [ocr-cpu], limits: [5/second]}
  - {callers: ["corp/*"], methods: ["*"]}
"""
        % ("a" * 64)
    )
    assert [line.strip() for line in check(path)] == [
        f"{path}: ok, 2 rules, 1 issuer, 1 key",
        "rules[0]: key/scanner may call ocr/*, models pen-*, in pools ocr-cpu, at most 5/second",
        "rules[1]: corp/* may call *",
        f"warning: tokens[0].keys: there is no file {tmp_path / 'jwks.json'}",
    ]
    path.write_text("rules: [{callers: [nobody], methods: ['*']}]")
    with pytest.raises(ConfigError, match=r"rules\[0\].callers: 'nobody' is nobody"):
        check(path)
