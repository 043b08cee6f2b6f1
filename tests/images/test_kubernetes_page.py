"""docs/kubernetes.md keeps its promise: ten commands, which name what there is."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from inkwell.cli import main
from tests.images.dockerfile import HARDWARE, MODEL_SERVICES, ROOT

_PAGE = (ROOT / "docs" / "kubernetes.md").read_text("utf-8")
_STEPS, _, _REST = _PAGE.partition("## Other hardware")


def _commands() -> list[str]:
    """The indented blocks of the numbered steps, each without its indentation."""
    blocks = re.findall(r"^\d+\. .*\n(?:   ?\s?\S.*\n)*\n((?: {7,8}.*\n)+)", _STEPS, re.MULTILINE)
    return [re.sub(r"^ {7,8}", "", block, flags=re.MULTILINE).strip() for block in blocks]


def _own_overlay() -> str:
    (here_document,) = re.findall(r"<<'END'\n(.*\n)END", "\n".join(_commands()), re.DOTALL)
    return str(here_document)


def test_there_are_ten_commands() -> None:
    assert len(_commands()) == len(re.findall(r"^\d+\. ", _STEPS, re.MULTILINE)) == 10


def test_the_overlays_and_images_that_it_names_are_there() -> None:
    rows = re.findall(r"^\| .* \| `(\w+)` \| `HARDWARE=\"?([\w ]+)\"?` \|", _REST, re.MULTILINE)
    assert {overlay for overlay, _ in rows} == {path.name for path in (ROOT / "k8s" / "overlays").iterdir()} - {"mine"}
    for overlay, hardware in rows:
        pools = set(
            re.findall(r"pools/(\w+)", (ROOT / "k8s" / "overlays" / overlay / "kustomization.yaml").read_text())
        )
        assert set(hardware.split()) == pools & set(HARDWARE), overlay


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl, which renders the overlay, is not installed")
def test_the_overlay_of_ones_own_renders_with_the_registrys_images(tmp_path: Path) -> None:
    bases = os.path.relpath((ROOT / "k8s" / "overlays").resolve(), tmp_path.resolve())
    (tmp_path / "kustomization.yaml").write_text(_own_overlay().replace("../", f"{bases}/"))
    rendered = subprocess.run(["kubectl", "kustomize", tmp_path], capture_output=True, check=True, text=True).stdout
    objects = list(yaml.safe_load_all(rendered))
    images = {
        container["image"]
        for thing in objects
        if thing["kind"] == "Deployment"
        for container in thing["spec"]["template"]["spec"]["containers"]
    }
    assert images
    for image in images:
        assert re.fullmatch(r"registry\.example\.com/inkwell/\w+:\d+\.\d+\.\d+(-(cpu|cuda))?", image)
    (claim,) = [t for t in objects if t["kind"] == "PersistentVolumeClaim" and t["metadata"]["name"] == "models"]
    assert claim["spec"]["storageClassName"] == "your-shared-class"


def test_its_call_is_one_that_the_command_line_knows(capsys: pytest.CaptureFixture[str]) -> None:
    call = re.sub(r"'", "", _commands()[-1]).split()
    assert call[:2] == ["inkwell", "read"]
    assert (ROOT / call[2]).is_file()
    assert main([*call[1:], "--help"]) == 0
    assert call[3] in capsys.readouterr().out


def test_every_service_has_an_image_in_the_overlay_of_ones_own() -> None:
    named = {image["name"] for image in yaml.safe_load(_own_overlay())["images"]}
    assert named == {f"inkwell/{service}" for service in ("gateway", *MODEL_SERVICES)}
