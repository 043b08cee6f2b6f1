"""docs/compiler.md says what the compiler does."""

import re
from pathlib import Path

from services.compiler.making import _REASONS
from services.compiler.settings import Settings
from services.kit.operations import OperationsSettings

PAGE = (Path(__file__).parents[3] / "docs" / "compiler.md").read_text(encoding="utf-8")


def test_every_setting_stands_with_its_default() -> None:
    rows = {
        name: value.strip("` ") for name, value in re.findall(r"^\| `([A-Z_]+)` \| (.*?) ?\|", PAGE, flags=re.MULTILINE)
    }
    for name, field in Settings.model_fields.items():
        if name in OperationsSettings.model_fields:
            continue  # on the page of all services
        if name == "models":
            assert rows["MODELS"] == "the embedded ones"
            continue
        default = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
        assert rows[name.upper()] == default.removesuffix(".0"), name


def test_every_reason_of_a_failed_compile_is_named() -> None:
    for reason in _REASONS.values():
        assert f"`{reason}`" in PAGE, reason
