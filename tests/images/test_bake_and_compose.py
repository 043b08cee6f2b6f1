"""docker-bake.hcl and compose.yaml fit the Dockerfiles, the settings and each other."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import hcl2
import pytest
import yaml
from hcl2.utils import SerializationOptions

import inkwell
from services.gateway import config
from tests.images import dockerfile
from tests.images.dockerfile import HARDWARE, MODEL_SERVICES, ROOT, SERVICES
from tests.images.test_dockerfiles import settings_of


def _bake() -> dict[str, Any]:
    """The file, its strings without quotes; expressions stay as they are written."""
    options = SerializationOptions(with_comments=False, strip_string_quotes=True, explicit_blocks=False)
    return dict(hcl2.loads((ROOT / "docker-bake.hcl").read_text("utf-8"), serialization_options=options))


def _targets() -> dict[str, dict[str, Any]]:
    """Every target that the file comes to, with what it inherits and with its matrix spelled out."""
    written = {name: target for block in _bake()["target"] for name, target in block.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, target in written.items():
        whole: dict[str, Any] = {}
        for layer in [*(written[other] for other in target.get("inherits", [])), target]:
            whole |= layer | {"args": whole.get("args", {}) | layer.get("args", {})}
        matrix = whole.pop("matrix", {})
        for values in itertools.product(*matrix.values()):
            chosen = dict(zip(matrix, values, strict=True))
            found[_put(whole.get("name", name), chosen)] = _filled(whole, chosen)
    return found


def _filled(value: Any, chosen: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(inner, chosen) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, chosen) for inner in value]
    return _put(value, chosen) if isinstance(value, str) else value


def _put(text: str, chosen: dict[str, str]) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda found: chosen.get(found[1], found[0]), chosen.get(text, text))


def _compose() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8")))


# --- bake ---


def test_bake_has_a_target_for_every_image() -> None:
    models = {f"{service}-{hardware}" for service in MODEL_SERVICES for hardware in HARDWARE}
    teaching = {f"finetune-{hardware}" for hardware in HARDWARE}
    assert set(_targets()) == {"common", "gateway", *models, *teaching}


def test_what_bake_builds_is_a_stage_and_what_it_passes_is_an_argument() -> None:
    for name, target in _targets().items():
        if name == "common":
            continue
        service = Path(target["dockerfile"]).parent.name
        file = dockerfile.read(service)
        assert Path(target["dockerfile"]) == Path("services") / service / "Dockerfile"
        assert target["target"] in HARDWARE
        assert target["target"] in file.stages
        known = {i.text.partition("=")[0] for stage in file.stages.values() for i in stage.of("ARG")}
        assert set(target["args"]) <= known
        place = (
            f"{service}:${{VERSION}}"
            if service == "gateway"
            else f"{name.split('-')[0]}:${{VERSION}}-{target['target']}"
        )
        assert target["tags"] == [f"${{REGISTRY}}inkwell/{place}"]


def test_bakes_groups_are_made_of_targets_and_the_default_is_all_that_serves() -> None:
    groups = {name: group["targets"] for block in _bake()["group"] for name, group in block.items()}
    for hardware in HARDWARE:
        assert groups[hardware] == ["gateway", *(f"{service}-{hardware}" for service in MODEL_SERVICES)]
    assert set(groups["default"]) == set(HARDWARE)
    assert set(groups["finetune"]) <= set(_targets())


def test_bake_builds_this_version() -> None:
    defaults = {name: variable["default"] for block in _bake()["variable"] for name, variable in block.items()}
    assert defaults["VERSION"] == inkwell.__version__


# --- compose ---


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_takes_what_compose_tells_it(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = _compose()["services"][service]
    image = dockerfile.read(service).environment(told["build"]["target"])
    for name, value in (image | told["environment"]).items():
        monkeypatch.setenv(name, value)
    assert settings_of(service)().host == "0.0.0.0"
    assert set(told["environment"]) <= {
        f"INKWELL_{service.upper()}_{name.upper()}" for name in settings_of(service).model_fields
    }


@pytest.mark.parametrize("service", SERVICES)
def test_compose_builds_and_runs_the_image_of_bake(service: str) -> None:
    told, targets = _compose()["services"][service], _targets()
    target = targets["gateway" if service == "gateway" else f"{service}-cpu"]
    assert told["build"] == {"context": ".", "dockerfile": target["dockerfile"], "target": target["target"]}
    assert [told["image"]] == [_put(tag, {"REGISTRY": "", "VERSION": inkwell.__version__}) for tag in target["tags"]]


def test_what_compose_runs_can_write_to_its_home_and_tmp_only_and_is_reached_from_this_machine_only() -> None:
    compose = _compose()
    for name, told in compose["services"].items():
        assert told["read_only"] is True
        assert told["cap_drop"] == ["ALL"]
        assert told["security_opt"] == ["no-new-privileges:true"]
        places = {volume.partition(":") for volume in told.get("volumes", [])}
        assert {volume for volume, _, _ in places} <= set(compose["volumes"])
        assert {place for _, _, place in places} <= {"/home/inkwell", "/tmp"}
        assert all(port.startswith("127.0.0.1:") for port in told.get("ports", []))
        # SIGKILL comes only after the calls that were admitted had their time.
        assert int(told["stop_grace_period"].removesuffix("s")) > settings_of(name)().drain_grace_s


def test_composes_gateway_knows_the_services_by_the_names_and_ports_that_they_have() -> None:
    compose = _compose()
    told = compose["services"]["gateway"]
    assert told["configs"] == [{"source": "gateway", "target": told["environment"]["INKWELL_GATEWAY_CONFIG"]}]
    pools = config.parse(compose["configs"]["gateway"]["content"], name="compose.yaml").pools
    assert {pool.service for pool in pools} == set(MODEL_SERVICES)
    for pool in pools:
        assert list(pool.targets) == [f"dns:///{pool.service}:{settings_of(pool.service)().port}"]
        assert pool.hardware == compose["services"][pool.service]["build"]["target"]


# --- the bill of materials ---


def test_the_bill_of_materials_lists_what_is_installed() -> None:
    made = subprocess.run(
        [sys.executable, ROOT / "requirements" / "sbom.py", "inkwell-test"], capture_output=True, check=True, text=True
    )
    bill = json.loads(made.stdout)
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert bill["metadata"]["component"]["name"] == "inkwell-test"
    components = {component["name"]: component for component in bill["components"]}
    pinned = re.search(r"^msgspec==(\S+)$", (ROOT / "requirements" / "cpu.txt").read_text("utf-8"), re.MULTILINE)
    assert pinned is not None
    assert components["msgspec"]["version"] == pinned[1]
    assert components["msgspec"]["purl"] == f"pkg:pypi/msgspec@{pinned[1]}"
    assert components["inkwell"]["licenses"] == [{"expression": "Apache-2.0"}]
    assert "+" not in components["torch"]["purl"]
