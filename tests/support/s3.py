"""An S3 server on this machine: moto's, over HTTP, that can be watched, made to fail, stopped and started again."""

import contextlib
import functools
import logging
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import boto3
import pytest
from botocore.loaders import JSONFileLoader
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

# Reading Amazon's definitions takes longer than any test; every client of a process, and of those forked from it, uses
# the same.
_read = JSONFileLoader.load_file


@functools.cache
def _definitions(path: str) -> Any:
    return _read(JSONFileLoader(), path)


JSONFileLoader.load_file = lambda _, path: _definitions(path)
boto3.client("s3", region_name="us-east-1")

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
        self.lose_answer = 0  # the number of a request that is served, but whose answer never arrives
        self._application = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Condition()
        self._under_way = 0
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
        """Counts requests from 1 again, and asks the hook about each. Forgets `lose_answer` of before."""
        with self._lock:
            self.requests, self.hook, self.lose_answer = [], hook, 0

    def _serve(self, environment: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with self._lock:
            self.requests.append(f"{environment['REQUEST_METHOD']} {environment['PATH_INFO']}")
            number, hook = len(self.requests), self.hook
            self._under_way += 1
        try:
            return self._answer(number, hook, environment, start_response)
        finally:
            with self._lock:
                self._under_way -= 1
                self._lock.notify_all()

    def wait_until_idle(self) -> None:
        """Waits for the requests under way, whose clients may be dead already."""
        with self._lock:
            self._lock.wait_for(lambda: not self._under_way)

    def _answer(
        self, number: int, hook: Hook | None, environment: dict[str, Any], start_response: Any
    ) -> Iterable[bytes]:
        answer = hook(number, environment) if hook else None
        if answer is None:
            served: Iterable[bytes] = self._application(environment, start_response)
            if number != self.lose_answer:
                return served
        status, body = answer or ("", b"")
        if not status:
            environment["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError
        start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [] if environment["REQUEST_METHOD"] == "HEAD" else [body]


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
