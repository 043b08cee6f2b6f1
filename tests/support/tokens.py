"""An issuer of JWTs: its keys as a file or behind a URL, and tokens as a test wants them."""

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from joserfc import jwt
from joserfc.jwk import ECKey

ISSUER = "https://login.test"
AUDIENCE = "inkwell"


class Issuer:
    """Signs with its newest key; `jwks` has all of them."""

    def __init__(self) -> None:
        self.keys: list[ECKey] = []
        self.rotate()

    def rotate(self, *, keep: bool = False) -> None:
        """Take a new key into use, and withdraw the old ones unless they are to be kept."""
        key = ECKey.generate_key("P-256", {"kid": f"key-{time.monotonic_ns()}"})
        self.keys = [*self.keys, key] if keep else [key]

    @property
    def jwks(self) -> bytes:
        return json.dumps({"keys": [key.as_dict(private=False) for key in self.keys]}).encode()

    def write(self, path: Path) -> Path:
        path.write_bytes(self.jwks)
        return path

    def token(self, *, header: dict[str, Any] | None = None, without: str = "", **claims: Any) -> str:
        """A token of alice, good for a minute, with these claims and header entries instead."""
        now = int(time.time())
        said = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "iat": now, "exp": now + 60} | claims
        said.pop(without, None)
        return jwt.encode({"alg": "ES256", "kid": self.keys[-1].kid} | (header or {}), said, self.keys[-1])


class KeyServer:
    """Serves the keys of an issuer over HTTP, and counts how often they were asked for."""

    def __init__(self, issuer: Issuer, port: int = 0) -> None:
        self.asked = 0

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(handler) -> None:  # noqa: N802, N805
                self.asked += 1
                handler.send_response(200)
                handler.end_headers()
                handler.wfile.write(issuer.jwks)

            def log_message(handler, *_: Any) -> None:  # noqa: N805
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/jwks.json"

    @contextlib.contextmanager
    def running(self) -> Iterator["KeyServer"]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()
