"""Diffusion models of a hub: fetched at their pinned revision, without code and pickles, and kept."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hub import COMMIT, Hub
from tests.unit.diffusion.conftest import Families


@pytest.fixture(scope="module")
def hub(families: Families, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A repository as published ones are: pickles, code and a whole checkpoint in one file lie there too."""
    folder = tmp_path_factory.mktemp("repository") / "sd15"
    shutil.copytree(families.folder("sd15"), folder)
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "v1-5-pruned.safetensors").write_bytes(b"the same again")
    (folder / "pipeline.py").write_text("raise SystemExit('code of a repository was run')")
    served = Hub(folder)
    yield served
    served.server.shutdown()
    served.server.server_close()


# The library reads its settings when it is imported, so it has a process of its own; one, for that takes seconds.
PROGRAM = """
import sys, json, torch
from services.diffusion.engine.models import LoadedModel
from services.runtimes.diffusion_sources import ModelError
from services.diffusion.settings import ModelSettings
from services.runtimes.hardware import Hardware
answers = []
for source, config in json.loads(sys.argv[1]):
    try:
        row = ModelSettings(source=source, config=config)
        model = LoadedModel("mine", row, Hardware("cpu", "cpu", "CPU", 1 << 30, 1), torch.float32)
        answers.append(["loaded", str(model.info.parameter_count)])
    except ModelError as error:
        answers.append([type(error).__name__, str(error)])
print(json.dumps(answers))
"""


def load(hub: Hub, home: Path, *rows: tuple[str, str | None], **environment: str) -> list[list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(rows)],
        env={**hub.environment(home), **environment},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers: list[list[str]] = json.loads(done.stdout.splitlines()[-1])
    return answers


def test_repositories_at_a_pinned_revision(hub: Hub, families: Families, tmp_path: Path) -> None:
    configured, whole, no_revision, no_repository = load(
        hub,
        tmp_path,
        (str(families.file("sd15")), f"owner/model@{COMMIT}"),
        ("owner/model@v1", None),
        ("owner/model@v2", None),
        ("owner/nothing@v1", None),
    )
    assert configured[0] == "loaded", configured
    assert whole == configured
    # Each file once, and neither code nor pickles nor what no part is made of.
    fetched = [path for path in hub.asked if path.endswith(".safetensors")]
    assert {path.rpartition(f"{COMMIT}/")[2] for path in fetched} == {
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }
    assert not [path for path in hub.asked if path.endswith((".py", ".bin"))]
    for (kind, message), source in ((no_revision, "owner/model@v2"), (no_repository, "owner/nothing@v1")):
        assert kind == "ModelMissingError"
        assert f"{source}: the hub has no such repository or revision" in message
    # From then on no hub is needed for what is in the cache, and what is not there is said.
    cached, out_of_reach = load(hub, tmp_path, ("owner/model@v1", None), ("owner/another@v1", None), HF_HUB_OFFLINE="1")
    assert cached == whole
    assert out_of_reach[0] == "ModelError"
    assert "not in the hub's cache" in out_of_reach[1]
