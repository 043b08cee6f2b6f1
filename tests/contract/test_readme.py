"""The README keeps its word: its Python example runs as printed, against running services."""

import re
from pathlib import Path

import pytest

from services import local

README = local.ROOT / "README.md"


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_there_is_an_example() -> None:
    assert python_blocks()


@pytest.mark.parametrize("block", python_blocks())
def test_the_example_runs(
    block: str, fleet: dict[str, local.Service], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = sorted(local.SAMPLES.glob("*.png"))[0]
    (tmp_path / "line.png").write_bytes(sample.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert "localhost:50050" in block
    exec(compile(block.replace("localhost:50050", fleet["gateway"].address), str(README), "exec"), {})  # noqa: S102
    written = [path for path in tmp_path.iterdir() if path.name != "line.png"]
    assert written, "the example saves a picture"


def test_every_link_leads_somewhere() -> None:
    for page in [README, *(local.ROOT / "docs").rglob("*.md"), local.ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.relative_to(local.ROOT)} links to {link}"


def test_every_make_target_named_in_the_docs_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (local.ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in [README, *(local.ROOT / "docs").rglob("*.md"), local.ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"`make ([a-z]+)", page.read_text()):
            assert target in targets, f"{page.relative_to(local.ROOT)} names make {target}"
