"""Checkpoints of a hub: a small server on loopback speaks what the hub library asks for."""

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from services.runtimes import checkpoints
from services.runtimes.checkpoints import Checkpoint, CheckpointError, CheckpointMissingError
from tests.support import tiny_trocr

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves one repository, owner/model, at one commit that has the tag v1."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def log_message(self, *args: object) -> None:
                pass

            def answer(self, *, body: bool) -> None:
                path = unquote(urlsplit(self.path).path)
                hub.asked.append(path)
                for revision in (COMMIT, "v1"):
                    if path == f"/api/models/owner/model/revision/{revision}":
                        files = sorted(file.name for file in folder.iterdir())
                        info = {"id": "owner/model", "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]}
                        return self.send(json.dumps(info).encode(), body, "application/json")
                    if path == f"/api/models/owner/model/tree/{revision}":
                        tree = [
                            {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": digest(f)}
                            for f in sorted(folder.iterdir())
                        ]
                        return self.send(json.dumps(tree).encode(), body, "application/json")
                    prefix = f"/owner/model/resolve/{revision}/"
                    if path.startswith(prefix) and (folder / path.removeprefix(prefix)).is_file():
                        file = folder / path.removeprefix(prefix)
                        return self.send(file.read_bytes(), body, "application/octet-stream", digest(file))
                self.send_response(404)
                known = "/owner/model/" in path
                self.send_header("X-Error-Code", "RevisionNotFound" if known else "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return None

            def send(self, content: bytes, body: bool, kind: str, etag: str = "") -> None:
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{etag}"')
                self.end_headers()
                if body:
                    self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


def digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()


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
        env={
            "PATH": "/usr/bin:/bin",
            "HF_HOME": str(home),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
            **environment,
        },
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
