"""docs/gateway.md says what the gateway does."""

import re
from pathlib import Path

from services.gateway import config
from services.gateway.preference import LABELS
from services.gateway.settings import Settings
from services.kit.settings import ServiceSettings

PAGE = (Path(__file__).parents[3] / "docs" / "gateway.md").read_text(encoding="utf-8")


def test_the_examples_are_valid_configurations() -> None:
    pools, routes, *_ = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    assert [pool.name for pool in config.parse(pools).pools] == ["ocr-cuda", "ocr-cpu", "diffusion-cuda"]
    assert len(config.parse(routes).routes) == 2


def test_every_setting_stands_with_its_default() -> None:
    rows = dict(re.findall(r"^\| (`[A-Z].*?`) \| (.*?) \|", PAGE, flags=re.MULTILINE))
    told = {
        name.strip("` "): value.strip("` ")
        for names, values in rows.items()
        for name, value in zip(names.split(","), values.split(","), strict=True)
    }
    common = ServiceSettings.model_fields
    for name, field in Settings.model_fields.items():
        if name == "port" or (name in common and common[name].default == field.default):
            continue  # on the page of all services
        default = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
        assert told[name.upper()] == default


def test_every_hardware_label_is_named() -> None:
    assert ", ".join(LABELS) in PAGE
