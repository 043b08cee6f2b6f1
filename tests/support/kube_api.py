"""As much of a Kubernetes API server as serves EndpointSlices: HTTPS, tokens, a list, watches, versions that expire."""

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.support.certificates import Authority

TOKEN = "token-of-the-account"


def endpoint_slice(
    name: str,
    *hosts: str,
    service: str = "ocr",
    port: int = 50051,
    port_name: str = "grpc",
    leaving: tuple[str, ...] = (),
) -> dict[str, Any]:
    """A slice of ready endpoints, and of some that terminate."""
    going = {"ready": False, "serving": True, "terminating": True}
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "ports": [{"name": port_name, "port": port, "protocol": "TCP"}],
        "endpoints": [
            *({"addresses": [host], "conditions": {"ready": True}} for host in hosts),
            *({"addresses": [host], "conditions": going} for host in leaving),
        ],
    }


class KubeApi:
    """One namespace. `requests` are the parameters that were asked with, `watched` is set while a watch is open."""

    def __init__(self, namespace: str = "prod") -> None:
        self.namespace = namespace
        self.url = ""
        self.token = TOKEN
        self.slices: dict[str, dict[str, Any]] = {}
        self.version = 100
        self.expired_before = 0  # versions that a watch can no longer go on from
        self.requests: list[dict[str, str]] = []
        self.statuses: list[int] = []
        self.watched = asyncio.Event()
        self.asked = asyncio.Event()
        self._watches: set[asyncio.Queue[dict[str, Any] | None]] = set()

    def put(self, item: dict[str, Any]) -> None:
        """Make or change a slice, and tell who watches."""
        name = item["metadata"]["name"]
        kind = "MODIFIED" if name in self.slices else "ADDED"
        self.slices[name] = item
        self._tell(kind, item)

    def delete(self, name: str) -> None:
        """Delete a slice, and tell who watches."""
        self._tell("DELETED", self.slices.pop(name))

    def send(self, event: dict[str, Any]) -> None:
        """Send an event to who watches, whatever it is."""
        for watch in self._watches:
            watch.put_nowait(event)

    def bookmark(self) -> None:
        """Tell who watches how far it is, without news."""
        self.version += 1
        self.send({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": str(self.version)}}})

    def end_watches(self) -> None:
        """As after the time that a watch asked for."""
        self.watched.clear()
        for watch in self._watches:
            watch.put_nowait(None)

    def _tell(self, kind: str, item: dict[str, Any]) -> None:
        self.version += 1
        item["metadata"]["resourceVersion"] = str(self.version)
        self.send({"type": kind, "object": item})

    @contextlib.asynccontextmanager
    async def serving(self, folder: Path) -> AsyncIterator[Path]:
        """Run on loopback; answers the folder of the service account: token and ca.crt."""
        account = Authority().folder(folder / "account", "localhost")
        (account / "token").write_text(self.token)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(account / "tls.crt", account / "tls.key")
        tasks: set[asyncio.Task[Any]] = set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            try:
                with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                    while True:
                        await self._answer(reader, writer)
            finally:
                tasks.discard(task)
                writer.close()

        server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=context)
        self.url = f"https://localhost:{server.sockets[0].getsockname()[1]}"
        try:
            yield account
        finally:
            server.close()
            for task in list(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        line, *headers = head.split("\r\n")
        path = urlsplit(line.split(" ")[1])
        asked = {key: values[0] for key, values in parse_qs(path.query).items()}
        self.requests.append(asked)
        self.asked.set()
        status: tuple[int, Any] | None = None
        if f"authorization: bearer {self.token}" not in [h.lower() for h in headers]:
            status = (401, {"kind": "Status", "code": 401})
        elif path.path != f"/apis/discovery.k8s.io/v1/namespaces/{self.namespace}/endpointslices":
            status = (404, {"kind": "Status", "code": 404})
        elif "watch" not in asked:
            status = (200, {"metadata": {"resourceVersion": str(self.version)}, "items": self._matching(asked)})
        self.statuses.append(200 if status is None else status[0])
        if status is not None:
            body = json.dumps(status[1]).encode()
            writer.write(f"HTTP/1.1 {status[0]} X\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
            await writer.drain()
            return
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        await self._send_events(asked, writer)

    async def _send_events(self, asked: dict[str, str], writer: asyncio.StreamWriter) -> None:
        events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        if int(asked["resourceVersion"]) < self.expired_before:
            events.put_nowait({"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "too old"}})
            events.put_nowait(None)
        else:
            for item in self._matching(asked):
                if int(item["metadata"].get("resourceVersion", 0)) > int(asked["resourceVersion"]):
                    events.put_nowait({"type": "MODIFIED", "object": item})
            self._watches.add(events)
            self.watched.set()
        try:
            while (event := await events.get()) is not None:
                data = json.dumps(event).encode() + b"\n"
                # In two pieces, as a network may have it.
                for piece in (data[:20], data[20:]):
                    writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                    await writer.drain()
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        finally:
            self._watches.discard(events)

    def _matching(self, asked: dict[str, str]) -> list[dict[str, Any]]:
        key, _, service = asked["labelSelector"].partition("=")
        return [item for item in self.slices.values() if item["metadata"]["labels"].get(key) == service]
