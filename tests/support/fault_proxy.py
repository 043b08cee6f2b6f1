"""A TCP proxy on loopback that breaks the connections it carries, when a test says so.

It stands in any test where a server's address would: callers connect to `address`, and it connects to the target for
each. Nothing happens by itself or by chance; a fault begins when a method is called and lasts until `heal`.
"""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from typing import Literal

End = Literal["caller", "server"]
# When it is due, what makes it due at once (`heal`, also of a chunk that waits behind another), and the bytes.
_Chunks = asyncio.Queue[tuple[float, asyncio.Event, bytes]]

_CHUNK_BYTES = 1 << 16
# Chunks on their way in one direction; a sender that fills them is no longer read from, and TCP slows it down.
_CHUNKS_MOST = 64
# SO_LINGER on, zero seconds: closing sends RST and drops what was not sent.
_RESET = struct.pack("ii", 1, 0)


class _Connection:
    """One caller's connection, and ours to the target for it."""

    def __init__(
        self,
        proxy: "FaultProxy",
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        server: asyncio.Task[None],
    ) -> None:
        self.proxy = proxy
        self.writers: dict[End, asyncio.StreamWriter] = {"caller": writer}
        self.task = server
        self._reader = reader

    async def carry(self, host: str, port: int) -> None:
        """Carry bytes both ways until both ends have closed."""
        try:
            reader, self.writers["server"] = await asyncio.open_connection(host, port, limit=_CHUNK_BYTES)
        except OSError:
            self.close("caller", reset=True)  # as if it had connected to the target itself, near enough
            return
        if self.proxy.gone:
            self.close(self.proxy.gone, reset=True)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._one_way(self._reader, "server"))
                group.create_task(self._one_way(reader, "caller"))
        finally:
            for end in self.writers:
                self.close(end, reset=False)

    def close(self, end: End, *, reset: bool) -> None:
        """Close our socket at that end: in order (FIN), or at once (RST)."""
        writer = self.writers.get(end)
        if writer is None:
            return
        if reset:
            with contextlib.suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()
        else:
            writer.close()

    async def _one_way(self, reader: asyncio.StreamReader, to: End) -> None:
        chunks: _Chunks = asyncio.Queue(_CHUNKS_MOST)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._read(reader, chunks))
            group.create_task(self._write(chunks, to))

    async def _read(self, reader: asyncio.StreamReader, chunks: _Chunks) -> None:
        clock = asyncio.get_running_loop().time
        data = b"."
        while data:
            try:
                data = await reader.read(_CHUNK_BYTES)
            except OSError:
                data = b""
            await chunks.put((clock() + self.proxy.delay_s, self.proxy.prompt, data))

    async def _write(self, chunks: _Chunks, to: End) -> None:
        writer = self.writers[to]
        clock = asyncio.get_running_loop().time
        while True:
            due, prompt, data = await chunks.get()
            if (left := due - clock()) > 0:
                self.proxy.delayed.set()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await prompt.wait()
            await self.proxy.flowing.wait()
            if self.proxy.gone:
                if data:
                    continue  # swallowed: nobody is at the other end, and this one is not told
                await asyncio.Event().wait()  # nor that an end was closed
            if not data:
                with contextlib.suppress(OSError, RuntimeError):
                    writer.write_eof()
                return
            with contextlib.suppress(OSError):
                await self._send(writer, to, data)

    async def _send(self, writer: asyncio.StreamWriter, to: End, data: bytes) -> None:
        proxy = self.proxy
        step = proxy.drip_bytes or len(data)
        for start in range(0, len(data), step):
            piece = data[start : start + step]
            if proxy.cut_after is not None and to == "caller":
                piece = piece[: proxy.cut_after]
                proxy.cut_after -= len(piece)
            writer.write(piece)
            await writer.drain()
            proxy.carried_bytes += len(piece)
            if proxy.cut_after == 0:
                proxy.cut_after = None
                proxy.cut()
                return
            if proxy.drip_bytes:
                await asyncio.sleep(proxy.drip_interval_s)


class FaultProxy:
    """Carries connections to `target` ("host:port"). Made and used on one event loop; see `fault_proxy`."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.port = 0
        self.accepted = 0  # connections so far
        self.carried_bytes = 0  # both ways
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.delay_s = 0.0  # of what comes from now on, in each direction
        self.delayed = asyncio.Event()  # something is or was
        self.prompt = asyncio.Event()  # what is delayed no longer is
        self.drip_bytes = 0
        self.drip_interval_s = 0.0
        self.gone: End | None = None
        self.cut_after: int | None = None
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None
        self._connected = asyncio.Event()

    @property
    def address(self) -> str:
        """Where callers connect."""
        return f"127.0.0.1:{self.port}"

    async def listen(self) -> None:
        """Take connections (again), always on the same port."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, limit=_CHUNK_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]

    # --- faults ---

    def cut(self) -> None:
        """Close every connection in order, at both ends, as a process that ends does; new ones are carried."""
        for connection in list(self._connections):
            connection.close("caller", reset=False)
            connection.close("server", reset=False)

    def reset(self) -> None:
        """Reset every connection at both ends, as a machine that comes back after a crash does."""
        for connection in list(self._connections):
            connection.close("caller", reset=True)
            connection.close("server", reset=True)

    def cut_in(self, count: int) -> None:
        """`cut` once that many more bytes have gone to callers: in the middle of a header, or of a message."""
        self.cut_after = count

    def hold(self) -> None:
        """Carry nothing, close nothing: a stopped process, or a switch that thinks. Lasts until `heal`."""
        self.flowing.clear()

    def half_open(self, gone: End) -> None:
        """One end of every connection has vanished, and the other end is not told; so too of new ones, until `heal`."""
        self.gone = gone
        for connection in list(self._connections):
            connection.close(gone, reset=True)

    def drip(self, count: int, interval_s: float) -> None:
        """Carry `count` bytes at a time with pauses between, both ways, until `heal`."""
        self.drip_bytes, self.drip_interval_s = count, interval_s

    async def refuse(self) -> None:
        """Take no new connections (ECONNREFUSED) until `heal`; those there are stay."""
        if self._server is not None:
            server, self._server = self._server, None
            server.close()
            # Not wait_closed: from Python 3.12 on it waits for the connections too.

    async def heal(self) -> None:
        """Carry as if nothing had been. What is half-open is reset: the end that was left is told at last."""
        if self.gone:
            for connection in list(self._connections):
                connection.task.cancel()
        self.gone = self.cut_after = None
        self.delay_s = 0.0
        self.prompt.set()
        self.prompt, self.delayed = asyncio.Event(), asyncio.Event()
        self.drip_bytes = 0
        self.flowing.set()
        if self._server is None:
            await self.listen()

    # --- what tests wait for ---

    async def connected(self, count: int) -> None:
        """Return when `count` connections have been taken since the beginning."""
        while self.accepted < count:
            self._connected.clear()
            await self._connected.wait()

    async def close(self) -> None:
        """End everything."""
        await self.refuse()
        tasks = [connection.task for connection in self._connections]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connection = _Connection(self, reader, writer, task)
        self._connections.add(connection)
        self.accepted += 1
        self._connected.set()
        host, _, port = self.target.rpartition(":")
        try:
            await connection.carry(host, int(port))
        except asyncio.CancelledError:
            pass  # by `close` or `heal`; asyncio's own server would report it as a defect
        finally:
            for end in list(connection.writers):
                connection.close(end, reset=True)
            self._connections.discard(connection)


@contextlib.asynccontextmanager
async def fault_proxy(target: str) -> AsyncIterator[FaultProxy]:
    """A proxy in front of the target, listening; closed at the end."""
    proxy = FaultProxy(target)
    await proxy.listen()
    try:
        yield proxy
    finally:
        await proxy.close()
