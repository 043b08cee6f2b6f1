"""Far more calls than there is room for: what is let in is done, and the rest is told at once when to come again.

`make soak` offers ten times the capacity for minutes and measures goodput and waiting (docs/reliability.md).
"""

import asyncio
from collections import Counter
from pathlib import Path

import grpc
from google.rpc import error_details_pb2

from tests.integration.test_gateway import detail
from tests.support import counting_service
from tests.support.backend import UNARY
from tests.support.counting_service import pool_at, request
from tests.support.gateway import running

SLOTS = 2
WAITING = 8
CALLS = 300
# The last of a call that comes when the first of those inside have been done, and how long they take is known.
REASONS = {"QUEUE_FULL", "CALLER_QUEUE_FULL", "WAIT_TOO_LONG"}


async def test_every_call_beyond_the_room_is_refused_at_the_door_and_every_other_is_done(tmp_path: Path) -> None:
    service = counting_service.build(counting_service.Settings(slots=SLOTS))
    await service.start()
    await service.wait_ready()
    async with running(pool_at(service), queue_limit=WAITING, limit_initial=SLOTS) as gateway:
        release = tmp_path / "release"
        recognize = gateway.channel.unary_unary(UNARY)
        asked = request(count=2, hold_at=1, release=str(release))
        refused: list[grpc.aio.AioRpcError] = []
        enough = asyncio.Event()

        async def call() -> str:
            try:
                assert await recognize(asked, timeout=120) == b"2"
            except grpc.aio.AioRpcError as error:
                refused.append(error)
                if len(refused) >= CALLS - SLOTS - WAITING:
                    enough.set()
                return str(error.code().name)
            return "OK"

        calls = [asyncio.create_task(call()) for _ in range(CALLS)]
        await enough.wait()  # while those inside are held: nobody waits for a deadline to be refused
        await asyncio.to_thread(release.touch)
        outcomes = Counter(await asyncio.gather(*calls))
        assert set(outcomes) == {"OK", "RESOURCE_EXHAUSTED"}
        # One caller may not have the whole queue.
        assert SLOTS + WAITING // 2 <= outcomes["OK"] <= SLOTS + WAITING
        for error in refused:
            assert detail(error, error_details_pb2.ErrorInfo()).reason in REASONS
            assert detail(error, error_details_pb2.RetryInfo()).retry_delay.ToMilliseconds() > 0
            assert int(dict(error.trailing_metadata() or ())["grpc-retry-pushback-ms"]) > 0
        # The service was not troubled with what it could not have done.
        assert service.metrics.registry.get_sample_value("inkwell_refused_total", {"reason": "QUEUE_FULL"}) is None
        # And afterwards there is room again.
        assert await recognize(request(count=1), timeout=60) == b"1"
    await service.stop(0)
