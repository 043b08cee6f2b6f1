"""A small server on loopback that speaks what the hub's library asks for."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

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
                        files = [str(file.relative_to(folder)) for file in hub.files(folder)]
                        info = {"id": "owner/model", "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]}
                        return self.send(json.dumps(info).encode(), body, "application/json")
                    if path == f"/api/models/owner/model/tree/{revision}":
                        tree = [
                            {
                                "type": "file",
                                "path": str(f.relative_to(folder)),
                                "size": f.stat().st_size,
                                "oid": digest(f),
                            }
                            for f in hub.files(folder)
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

    @staticmethod
    def files(folder: Path) -> list[Path]:
        """All of the repository's files, sorted."""
        return sorted(file for file in folder.rglob("*") if file.is_file())

    def environment(self, home: Path) -> dict[str, str]:
        """What makes the hub's library ask this server and keep its cache in `home`; for a process of its own."""
        return {
            "PATH": "/usr/bin:/bin",
            "HF_HOME": str(home),
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
        }


def digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()
