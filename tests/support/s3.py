"""An S3 server on this machine: moto's, over HTTP, that can be watched, made to fail, stopped and started again."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

# It logs every request otherwise.
logging.getLogger("werkzeug").setLevel(logging.ERROR)

# What a hook answers in the server's place: status line and body.
Answer = tuple[str, bytes]
# Called with the number of the request (1, 2, 3 …) and its WSGI environment before it is served; None to serve it.
Hook = Callable[[int, dict[str, Any]], Answer | None]


class S3Server:
    """The server and what it is asked."""

    def __init__(self) -> None:
        self.hook: Hook | None = None
        self.requests: list[str] = []  # since `watch`
        self._application = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._server: Any = None
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listens, on the same port as before; what was stored is still there."""
        self._server = make_server("127.0.0.1", self.port, self._serve, threaded=True)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Listens no more."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def refuse_from(self, number: int) -> None:
        """From the n-th request from now on every connection breaks without an answer."""
        self.watch(lambda at, _: ("", b"") if at >= number else None)

    def watch(self, hook: Hook | None = None) -> None:
        """Counts requests from 1 again, and asks the hook about each."""
        with self._lock:
            self.requests, self.hook = [], hook

    def _serve(self, environment: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with self._lock:
            self.requests.append(f"{environment['REQUEST_METHOD']} {environment['PATH_INFO']}")
            number, hook = len(self.requests), self.hook
        answer = hook(number, environment) if hook else None
        if answer is None:
            served: Iterable[bytes] = self._application(environment, start_response)
            return served
        status, body = answer
        if not status:
            environment["werkzeug.socket"].close()
            raise ConnectionResetError
        start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]


def refusal(status: str, code: str) -> Answer:
    """An error as S3 tells it."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code} for a test</Message></Error>"
    return status, body.encode()


@contextlib.contextmanager
def running(patch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A server that the AWS_* variables of this process lead to."""
    server = S3Server()
    for name, value in environment(server).items():
        patch.setenv(name, value)
    try:
        yield server
    finally:
        server.stop()


def environment(server: S3Server) -> dict[str, str]:
    """The variables that lead to the server."""
    return {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
