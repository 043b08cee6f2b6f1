"""docs/documents.md says what the service does."""

import re
from pathlib import Path

from services.ocr.documents import exports
from services.ocr.settings import Settings

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "documents.md").read_text(encoding="utf-8")


def test_every_setting_of_documents_stands_with_its_default() -> None:
    told = dict(re.findall(r"^\| `([A-Z_]+)` \| (\S+) \|", PAGE, flags=re.MULTILINE))
    names = [
        name
        for name in Settings.model_fields
        if re.search(r"(^|_)documents?(_|$)", name) or name in ("max_page_pixels", "max_page_lines")
    ]
    assert len(names) == 10
    for name in names:
        default = Settings.model_fields[name].default
        shown = f"{default:g}" if isinstance(default, float) else str(default).lower()
        assert told[name.upper()] == shown


def test_every_reason_that_documents_give_is_named() -> None:
    given = set()
    for file in [*(ROOT / "services/ocr/documents").glob("*.py"), ROOT / "services/ocr/document_converters.py"]:
        given |= set(re.findall(r'"((?:DOCUMENT|DOCUMENTS|PAGE)_[A-Z_]+)"', file.read_text(encoding="utf-8")))
    assert given
    for reason in given:
        assert f"`{reason}`" in PAGE


def test_every_file_s_media_type_is_named() -> None:
    for module in (exports.json, exports.text, exports.hocr, exports.alto, exports.page_xml):
        assert f"`{module.MEDIA_TYPE}`" in PAGE
