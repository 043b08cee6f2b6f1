"""The engine host over a real engine process: events, cancellation, crashes, stalls."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from services.kit.admission import Priority
from services.kit.engine_api import Accepted, Finished, Update
from services.kit.engine_host import EngineHost, EngineStartError
from services.kit.faults import Fault
from services.kit.job import Job, Queued
from services.kit.metrics import Metrics
from services.kit.settings import ServiceSettings
from tests.support.counting_engine import Count, Number

FACTORY = "tests.support.counting_engine:create_engine"


@pytest.fixture
async def host() -> AsyncIterator[EngineHost]:
    started = EngineHost(FACTORY, ServiceSettings(engine_stall_s=1.0), slots=2, metrics=Metrics("test"))
    await started.start()
    await started.wait_ready()
    yield started
    await started.stop()
    assert started.pid is None


def admit(host: EngineHost) -> Job:
    return host.admit(priority=Priority.NORMAL, time_left_s=None)


async def run(host: EngineHost, count: Count) -> list[object]:
    async with admit(host) as job:
        job.start(count)
        return [event async for event in job]


def number(payload: msgspec.Raw) -> Number:
    return msgspec.msgpack.decode(payload, type=Number)


async def until_running(job: Job) -> None:
    async for event in job:
        if isinstance(event, Accepted):
            return


async def until_not_ready(host: EngineHost) -> None:
    gone = asyncio.Event()

    def changed(ready: bool) -> None:
        if not ready:
            gone.set()

    host.on_ready_change = changed
    if host.ready:
        await gone.wait()


async def test_a_job_yields_its_events_in_order(host: EngineHost) -> None:
    events = await run(host, Count(count=3))
    assert isinstance(events[0], Accepted)
    assert [number(e.payload).value for e in events if isinstance(e, Update)] == [1, 2, 3]
    assert isinstance(events[-1], Finished)


async def test_what_does_not_fit_waits_and_is_told_its_position(host: EngineHost, tmp_path: Path) -> None:
    release = tmp_path / "go"
    held = Count(count=1, hold_at=1, release=str(release))
    async with admit(host) as first, admit(host) as second, admit(host) as third, admit(host) as fourth:
        for job in (first, second, third, fourth):
            job.start(held)
        await until_running(first)
        await until_running(second)
        assert await anext(third) == Queued(0)
        assert await anext(fourth) == Queued(1)
        release.touch()
        rest = [event async for event in fourth]
        assert rest[0] == Queued(0)
        assert isinstance(rest[-1], Finished)
        assert fourth.queue_ms > 0


async def test_leaving_a_waiting_job_frees_its_place(host: EngineHost, tmp_path: Path) -> None:
    release = tmp_path / "go"
    held = Count(count=1, hold_at=1, release=str(release))
    async with admit(host) as first, admit(host) as second:
        first.start(held)
        second.start(held)
        gone, last = admit(host), admit(host)
        async with gone:
            gone.start(held)
            last.start(Count(count=1))
            assert await anext(last) == Queued(1)
        assert await anext(last) == Queued(0)
        release.touch()
        assert isinstance([event async for event in last][-1], Finished)
    assert host.admission.waiting_count == 0


async def test_leaving_a_running_job_stops_its_work_and_frees_its_slot(host: EngineHost, tmp_path: Path) -> None:
    never = Count(count=1, hold_at=1, release=str(tmp_path / "never"))
    for _ in range(5):  # more than there are slots: they must come back
        async with admit(host) as job:
            job.start(never)
            await until_running(job)
    events = await run(host, Count(count=2))
    assert isinstance(events[-1], Finished)


async def test_a_job_that_the_engine_refuses_or_fails_ends_alone(host: EngineHost) -> None:
    refused, failed, fine = await asyncio.gather(
        run(host, Count(refuse=True)),
        run(host, Count(count=3, fail_at=2)),
        run(host, Count(count=3)),
        return_exceptions=True,
    )
    assert isinstance(refused, Fault)
    assert refused.data.fields[0].field == "count"
    assert isinstance(failed, Fault)
    assert failed.data.message == "told to fail"
    assert isinstance(fine, list)


@pytest.mark.parametrize("how", ["crash", "stall", "garble", "killed"])
async def test_a_lost_engine_ends_the_calls_inside_and_comes_back(host: EngineHost, tmp_path: Path, how: str) -> None:
    first_pid = host.pid
    bad = {
        "crash": Count(count=5, crash_at=2),
        "stall": Count(count=5, stall_at=2),
        "garble": Count(count=5, garble_at=2, hold_at=3, release=str(tmp_path / "never")),
        "killed": Count(count=1, hold_at=1, release=str(tmp_path / "never")),
    }[how]
    held = Count(count=1, hold_at=1, release=str(tmp_path / "never"))
    went_down = asyncio.create_task(until_not_ready(host))
    async with admit(host) as inside, admit(host) as neighbour, admit(host) as waiting:
        neighbour.start(held)
        await until_running(neighbour)
        inside.start(bad)
        waiting.start(Count(count=2))
        if how == "killed":
            await until_running(inside)
            assert first_pid is not None
            os.kill(first_pid, signal.SIGKILL)
        for job in (inside, neighbour):
            with pytest.raises(Fault) as lost:
                [event async for event in job]
            assert lost.value.data.reason == "ENGINE_LOST"
            assert lost.value.data.retry_after_ms is not None
        await went_down
        # What was only waiting is not lost: the next engine does it.
        events = [event async for event in waiting]
    assert isinstance(events[-1], Finished)
    assert number(events[-1].payload).pid != first_pid
    assert host.ready
    assert isinstance((await run(host, Count(count=1)))[-1], Finished)


async def test_no_call_is_admitted_while_there_is_no_engine() -> None:
    host = EngineHost(FACTORY, ServiceSettings(), slots=1, metrics=Metrics("test"))
    with pytest.raises(Fault) as refused:
        admit(host)
    assert refused.value.data.reason == "ENGINE_NOT_READY"
    assert refused.value.data.retry_after_ms is not None


async def test_an_engine_that_never_starts_is_given_up() -> None:
    broken = "tests.support.counting_engine:create_broken_engine"
    host = EngineHost(broken, ServiceSettings(), slots=1, metrics=Metrics("test"))
    await host.start()
    with pytest.raises(EngineStartError):
        await host.start_failed()
    assert not host.ready
    await host.stop()


async def test_an_engine_that_keeps_crashing_keeps_coming_back(host: EngineHost) -> None:
    for _ in range(3):
        async with admit(host) as job:
            job.start(Count(count=5, crash_at=1))
            with pytest.raises(Fault, match="ENGINE_LOST"):
                [event async for event in job]
        await host.wait_ready()
    assert isinstance((await run(host, Count(count=1)))[-1], Finished)


@pytest.mark.parametrize("count", [None, Count(stall_at=2)], ids=["idle", "in a step"])
async def test_an_engine_lets_go_of_what_outlives_it_when_the_service_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: Count | None
) -> None:
    ended = tmp_path / "ended"
    monkeypatch.setenv("COUNTING_END", str(ended))
    host = EngineHost(FACTORY, ServiceSettings(engine_stall_s=600.0), slots=1, metrics=Metrics("test"))
    await host.start()
    await host.wait_ready()
    if count is None:
        await host.stop()
    else:
        async with admit(host) as job:
            job.start(count)
            await until_running(job)
            await host.stop()
    assert ended.exists()
    assert host.pid is None
