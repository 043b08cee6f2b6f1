"""A caller in a process of its own, for tests that kill it: `python -m tests.support.caller_process`.

Makes calls at once, each with one request message, and waits for their answers for ever.
"""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator

import grpc

from tests.support.backend import BIDI, UNARY


@contextlib.asynccontextmanager
async def caller_process(
    address: str, path: str, request: bytes, *, calls: int
) -> AsyncIterator[asyncio.subprocess.Process]:
    """One that calls; killed at the end at the latest."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.support.caller_process", address, path, request.hex(), str(calls)
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _main(address: str, path: str, request: bytes, calls: int) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        await asyncio.gather(*(_call(channel, path, request) for _ in range(calls)))


async def _call(channel: grpc.aio.Channel, path: str, request: bytes) -> None:
    if path == UNARY:
        await channel.unary_unary(path)(request)
        return
    call = channel.stream_stream(path)(iter([request])) if path == BIDI else channel.unary_stream(path)(request)
    async for _ in call:
        pass


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], sys.argv[2], bytes.fromhex(sys.argv[3]), int(sys.argv[4])))
