"""The README and the docs keep their word: Python examples run as printed, against running services."""

import re
from pathlib import Path
from typing import Any

import pytest

from services import local
from tests.support.documents import pdf, written

README = local.ROOT / "README.md"
ADDRESS = "localhost:50050"


def examples() -> list[Any]:
    """The Python blocks of all pages that call a gateway."""
    blocks: list[Any] = []
    for page in [README, *sorted((local.ROOT / "docs").rglob("*.md"))]:
        found = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
        wanted = [block for block in found if ADDRESS in block]
        blocks += [pytest.param(block, id=f"{page.stem}-{number}") for number, block in enumerate(wanted)]
    return blocks


def test_the_readme_and_the_clients_page_have_examples() -> None:
    names = [example.id for example in examples()]
    assert "README-0" in names
    assert "client-0" in names


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the examples name: `line.png` with one line, `letter.pdf` with two pages of two."""
    (tmp_path / "line.png").write_bytes(sorted(local.SAMPLES.glob("*.png"))[0].read_bytes())
    (tmp_path / "letter.pdf").write_bytes(pdf([written(0, 1).image, written(2, 3).image]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("block", examples())
def test_examples_run(
    block: str, fleet: dict[str, local.Service], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(compile(block.replace(ADDRESS, fleet["gateway"].address), "<example>", "exec"), {})  # noqa: S102
    saved = re.findall(r"\.save\(\"(.+?)\"\)", block)
    assert all((folder / name).stat().st_size for name in saved)
    assert capsys.readouterr().out.strip(), "an example shows something"


def test_every_link_leads_somewhere() -> None:
    for page in [README, *(local.ROOT / "docs").rglob("*.md"), local.ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.relative_to(local.ROOT)} links to {link}"


def test_every_make_target_named_in_the_docs_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (local.ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in [README, *(local.ROOT / "docs").rglob("*.md"), local.ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"`make ([a-z-]+)", page.read_text()):
            assert target in targets, f"{page.relative_to(local.ROOT)} names make {target}"
