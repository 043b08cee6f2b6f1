"""A caller's request stream on its way to an endpoint, kept for as long as it may have to be sent again."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import grpc


class RequestFeed:
    """Reads the caller's messages one at a time, the next when the last was taken by the endpoint.

    Up to `keep_bytes` of messages are kept, and sent again to each newly attached upstream call. Once there were more,
    or after `commit`, nothing is kept and `repeatable` is False.
    """

    def __init__(self, requests: AsyncIterator[bytes], *, keep_bytes: int) -> None:
        self.repeatable = True
        self.error: Exception | None = None  # why the caller's stream could not be read on; the upstream is cancelled
        self.write_failed = False  # of the attached call: the endpoint no longer takes messages
        self._requests = requests
        self._room = keep_bytes
        self._messages: list[bytes] = []  # kept, or not sent yet
        self._sent = 0  # how many of them the attached call was sent
        self._ended = False  # the caller has half-closed
        self._upstream: Any = None
        self._attached = asyncio.Event()
        self._writing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def attach(self, upstream: Any) -> None:
        """Send everything to this stream-request call from now on, beginning with what was sent to the one before."""
        first = self._upstream is None
        self._upstream = upstream
        self._sent = 0
        self.write_failed = False
        self._attached.set()
        # The pump may be waiting for the caller's next message, so what there is already is sent beside it.
        self._spawn(self._pump() if first else self._catch_up())

    def commit(self) -> None:
        """The endpoint has answered: nothing will be sent again."""
        self.repeatable = False
        self._forget()

    async def close(self) -> None:
        """Stop reading."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self) -> None:
        try:
            async for message in self._requests:
                self._messages.append(message)
                self._room -= len(message)
                if self._room < 0:
                    self.repeatable = False
                await self._catch_up()
                if self.write_failed:
                    # No one takes messages: wait for the next attempt rather than gather them.
                    await self._attached.wait()
            self._ended = True
            await self._catch_up()
        except Exception as error:  # noqa: BLE001 - it ends the call, in whose handler it is raised again
            self.error = error
            self._upstream.cancel()

    async def _catch_up(self) -> None:
        async with self._writing:
            upstream = self._upstream
            try:
                while self._sent < len(self._messages):
                    await _write(upstream, self._messages[self._sent])
                    if upstream is not self._upstream:
                        return  # a new attempt was attached meanwhile, and has a task of its own for this
                    self._sent += 1
                    self._forget()
                if self._ended:
                    await upstream.done_writing()
            except (grpc.aio.AioRpcError, grpc.aio.InternalError, asyncio.InvalidStateError):
                self._stop_writing(upstream)
            except asyncio.CancelledError:
                # Of this task, or of the upstream call only.
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                self._stop_writing(upstream)

    def _forget(self) -> None:
        if not self.repeatable:
            del self._messages[: self._sent]
            self._sent = 0

    def _stop_writing(self, upstream: Any) -> None:
        # How the upstream call ended is for its reader to say.
        if upstream is self._upstream:
            self.write_failed = True
            self._attached.clear()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _write(upstream: Any, message: bytes) -> None:
    """Send one message; raises grpc.aio.InternalError if the endpoint takes no more."""
    await upstream.wait_for_connection()
    # Not `upstream.write`: in grpc.aio, a write that comes just after the endpoint has ended the call overwrites the
    # call's status with INTERNAL "Internal error from Core", and why the endpoint ended it is lost. This is what
    # `write` itself calls, without that.
    await upstream._cython_call.send_serialized_message(message)
