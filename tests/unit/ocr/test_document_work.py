"""A document's jobs over a real engine host: what is waited for, what is sent again, and what is given up."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from services.kit.admission import Priority
from services.kit.engine_host import EngineHost
from services.kit.faults import Fault
from services.kit.metrics import Metrics
from services.kit.settings import ServiceSettings
from services.ocr.documents.work import Worker
from tests.support.counting_engine import Count, Number


@pytest.fixture
async def host() -> AsyncIterator[EngineHost]:
    started = EngineHost(
        "tests.support.counting_engine:create_engine", ServiceSettings(queue_limit=1), slots=1, metrics=Metrics("test")
    )
    await started.start()
    await started.wait_ready()
    yield started
    await started.stop()


def worker(host: EngineHost, *, wait_ready_s: float = 60.0) -> Worker:
    return Worker(host, Priority.NORMAL, wait_ready_s=wait_ready_s, on_accepted=lambda: None)


async def number(work: Worker, count: Count) -> Number:
    done = await work.run(count, cost=1.0)
    return msgspec.msgpack.decode(done.payload, type=Number)


async def test_more_jobs_than_the_queue_holds_are_all_done(host: EngineHost) -> None:
    work = worker(host)
    read = await asyncio.gather(*(number(work, Count(count=n)) for n in range(1, 9)))
    assert [n.value for n in read] == list(range(1, 9))


async def test_callers_who_fill_the_queue_do_not_keep_a_document_out(host: EngineHost, tmp_path: Path) -> None:
    release = tmp_path / "go"
    held = Count(count=1, hold_at=1, release=str(release))
    with_slot = host.admit(priority=Priority.NORMAL, time_left_s=None)
    async with with_slot:
        with_slot.start(held)
        async with host.admit(priority=Priority.NORMAL, time_left_s=None) as waiting:
            waiting.start(held)
            with pytest.raises(Fault, match="QUEUE_FULL"):
                host.admit(priority=Priority.NORMAL, time_left_s=None)
            begun = asyncio.create_task(number(worker(host), Count(count=7)))
            await asyncio.sleep(0)  # let it enter
            assert host.admission.waiting_count == 2
            release.touch()
            assert (await begun).value == 7


async def test_a_job_that_went_down_with_its_engine_is_sent_again(host: EngineHost, tmp_path: Path) -> None:
    accepted = asyncio.Event()
    work = Worker(host, Priority.NORMAL, wait_ready_s=60, on_accepted=accepted.set)
    release = tmp_path / "go"
    running = asyncio.create_task(number(work, Count(count=2, hold_at=2, release=str(release))))
    await accepted.wait()
    before = host.pid
    assert before is not None
    os.kill(before, signal.SIGKILL)
    release.touch()
    done = await running
    assert done.value == 2
    assert done.pid not in (before, 0)


async def test_a_job_that_takes_the_engine_down_each_time_is_given_up(host: EngineHost) -> None:
    accepted = 0

    def count() -> None:
        nonlocal accepted
        accepted += 1

    work = Worker(host, Priority.NORMAL, wait_ready_s=60, on_accepted=count)
    with pytest.raises(Fault) as lost:
        await work.run(Count(crash_at=2), cost=1.0)
    assert lost.value.data.reason == "ENGINE_LOST"
    assert accepted == 3
    await host.wait_ready()
    assert (await number(work, Count(count=1))).value == 1


async def test_an_engine_that_does_not_come_back_is_not_waited_for_without_end(host: EngineHost) -> None:
    work = worker(host, wait_ready_s=0.0)
    with pytest.raises(Fault) as lost:
        await work.run(Count(crash_at=1), cost=1.0)
    assert lost.value.data.reason == "ENGINE_LOST"


async def test_what_is_wrong_with_the_job_itself_is_told_at_once(host: EngineHost) -> None:
    with pytest.raises(Fault) as refused:
        await worker(host).run(Count(refuse=True), cost=1.0)
    assert refused.value.data.reason == "INVALID_FIELD"


async def test_cancelling_cancels_in_the_engine(host: EngineHost, tmp_path: Path) -> None:
    accepted = asyncio.Event()
    work = Worker(host, Priority.NORMAL, wait_ready_s=60, on_accepted=accepted.set)
    running = asyncio.create_task(work.run(Count(hold_at=1, release=str(tmp_path / "never")), cost=1.0))
    await accepted.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    # There is one slot: only when it is free can this be done.
    assert (await number(worker(host), Count(count=1))).value == 1
