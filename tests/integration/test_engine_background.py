"""An engine that works on a thread of its own and becomes another while it runs, behind its host."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from services.kit.admission import Priority
from services.kit.engine_api import Accepted, Finished
from services.kit.engine_host import EngineHost
from services.kit.faults import Fault
from services.kit.job import Job
from services.kit.metrics import Metrics
from services.kit.settings import ServiceSettings
from tests.support.background_engine import Known, Learn

FACTORY = "tests.support.background_engine:create_engine"


@pytest.fixture
async def host() -> AsyncIterator[EngineHost]:
    started = EngineHost(FACTORY, ServiceSettings(queue_limit=3), slots=1, metrics=Metrics("test"))
    await started.start()
    await started.wait_ready()
    yield started
    await started.stop()


def known(host: EngineHost) -> Known:
    assert host.info is not None
    return msgspec.msgpack.decode(host.info, type=Known)


async def learned(job: Job) -> Known:
    async for event in job:
        if isinstance(event, Finished):
            return msgspec.msgpack.decode(event.payload, type=Known)
    raise AssertionError


async def test_the_host_knows_what_the_engine_became(host: EngineHost, tmp_path: Path) -> None:
    assert known(host).words == ()
    (tmp_path / "go").touch()
    async with host.admit(priority=Priority.NORMAL, time_left_s=None) as job:
        job.start(Learn("one", str(tmp_path / "go")))
        assert (await learned(job)).words == ("one",)
    # Told before the job's end.
    assert known(host).words == ("one",)


async def test_waiting_for_another_thread_costs_no_steps(host: EngineHost, tmp_path: Path) -> None:
    async with host.control() as slow:
        slow.start(Learn("slow", str(tmp_path / "later")))
        assert isinstance(await anext(slow), Accepted)
        (tmp_path / "go").touch()
        async with host.control() as quick:
            quick.start(Learn("quick", str(tmp_path / "go")))
            await learned(quick)
        (tmp_path / "later").touch()
        # One step each to accept and to tell the end, and the wake-ups' own.
        assert (await learned(slow)).steps <= 6


async def test_control_jobs_take_no_slot_and_are_bounded(host: EngineHost, tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    never = str(tmp_path / "never")
    async with host.control() as first, host.control() as second, host.control() as third:
        for job in (first, second, third):
            job.start(Learn("never", never))
            assert isinstance(await anext(job), Accepted)
        with pytest.raises(Fault, match="QUEUE_FULL"):
            host.control()
        async with host.admit(priority=Priority.NORMAL, time_left_s=None) as job:  # the only slot is free
            job.start(Learn("one", str(tmp_path / "go")))
            assert (await learned(job)).words == ("one",)
    async with host.control() as again:
        again.start(Learn("two", str(tmp_path / "go")))
        assert "two" in (await learned(again)).words


async def test_a_control_job_ends_with_its_engine(host: EngineHost, tmp_path: Path) -> None:
    async with host.control() as job:
        job.start(Learn("never", str(tmp_path / "never")))
        assert isinstance(await anext(job), Accepted)
        assert host._process is not None
        host._process.kill()
        with pytest.raises(Fault, match="ENGINE_LOST"):
            await anext(job)
    async with asyncio.timeout(60):
        while not host.ready:
            await host.wait_ready()
    assert known(host).words == ()
