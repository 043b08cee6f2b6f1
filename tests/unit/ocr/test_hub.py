"""Checkpoints of a hub."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.runtimes import checkpoints
from services.runtimes.checkpoints import Checkpoint, CheckpointError, CheckpointMissingError
from tests.support import tiny_trocr
from tests.support.hub import COMMIT, Hub


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tiny_trocr.save(tmp_path_factory.mktemp("repository"), tiny_trocr.build())
    (folder / "README.md").write_text("---\nlanguage: fr\n---\n")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling.py").write_text("raise SystemExit('code of a repository was run')")
    served = Hub(folder)
    yield served
    served.server.shutdown()
    served.server.server_close()


# The library reads its settings when it is imported, so each case has a process of its own.
PROGRAM = """
import sys, json
from services.runtimes import checkpoints
source, engine = sys.argv[1], sys.argv[2] == "engine"
if engine:
    from services.ocr.engine.main import create_engine
    from services.ocr.settings import Settings
    settings = Settings(models={"tiny": source}, threads=1, read_documents=False)
    (info,) = create_engine(settings.model_dump_json()).info().models
    print(json.dumps([info.name, info.languages]))
else:
    try:
        folder = checkpoints.fetch(checkpoints.resolve(source))
    except checkpoints.CheckpointError as error:
        print(json.dumps([type(error).__name__, str(error)]))
    else:
        print(json.dumps(sorted(file.name for file in folder.iterdir())))
"""


def fetch(hub: Hub, home: Path, source: str, what: str = "files", **environment: str) -> list[object]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, source, what],
        env={**hub.environment(home), **environment},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer: list[object] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_a_pinned_repository_is_fetched_without_code_and_pickles_and_kept(hub: Hub, tmp_path: Path) -> None:
    files = fetch(hub, tmp_path, "owner/model@v1")
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(map(str, files))
    assert not {"modeling.py", "pytorch_model.bin"} & set(map(str, files))
    assert not [path for path in hub.asked if path.endswith((".py", ".bin"))]
    # From then on no hub is needed.
    assert fetch(hub, tmp_path, "owner/model@v1", HF_HUB_OFFLINE="1") == files


def test_the_engine_serves_it_with_its_cards_languages(hub: Hub, tmp_path: Path) -> None:
    assert fetch(hub, tmp_path, f"owner/model@{COMMIT}", "engine") == ["tiny", ["fr"]]


@pytest.mark.parametrize("source", ["owner/model@v2", "owner/nothing@v1"])
def test_what_is_not_there_is_said(hub: Hub, tmp_path: Path, source: str) -> None:
    kind, message = fetch(hub, tmp_path, source)
    assert kind == CheckpointMissingError.__name__
    assert source in str(message)


def test_a_hub_out_of_reach_is_said(hub: Hub, tmp_path: Path) -> None:
    kind, message = fetch(hub, tmp_path, "owner/model@v1", HF_HUB_OFFLINE="1")
    assert kind == CheckpointError.__name__
    assert "not in the hub's cache" in str(message)


def test_a_folder_needs_no_hub(tmp_path: Path) -> None:
    assert checkpoints.fetch(Checkpoint(str(tmp_path), None)) == tmp_path
