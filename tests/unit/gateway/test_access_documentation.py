"""docs/access.md says what the gateway does."""

import re
from pathlib import Path

from services.gateway import access_file
from services.gateway.config import checked
from services.kit.settings import AUTHORITY, CERTIFICATE, KEY

PAGE = (Path(__file__).parents[3] / "docs" / "access.md").read_text(encoding="utf-8")


def test_the_example_is_a_valid_file() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    file = checked(access_file.AccessFile, text, name="access.yaml")
    assert [issuer.name for issuer in file.tokens] == ["corp"]
    assert [rule.limits for rule in file.rules] == [("50/second", "10000/day"), (), ()]


def test_the_defaults_of_an_issuer_are_told() -> None:
    fields = access_file.TokenIssuer.model_fields
    *others, last = fields["algorithms"].default
    assert f"{', '.join(others)} and {last} if left out" in PAGE
    for name in ("claim", "leeway_s"):
        assert f"{name}: {fields[name].default}" in PAGE


def test_the_files_of_certificates_are_named() -> None:
    for name in (CERTIFICATE, KEY, AUTHORITY):
        assert f"`{name}`" in PAGE


def test_what_rules_call_services_is_told() -> None:
    for short in set(access_file.SHORT.values()):
        assert f"`{short}/`" in PAGE
