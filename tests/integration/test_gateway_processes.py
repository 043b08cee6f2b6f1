"""A gateway of several processes, as callers and operators meet it: one port, one page, one health, one SIGTERM."""

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from tests.integration.test_gateway_process import start
from tests.integration.test_gateway_routing import backends
from tests.support.backend import UNARY, Backend
from tests.support.gateway import pool
from tests.support.processes import alive, wait_end

SERVING = health_pb2.HealthCheckResponse.SERVING
# A call waits for the connection, as one does that meets a process which starts.
CALL: dict[str, Any] = {"wait_for_ready": True, "timeout": 30}


class Gateway:
    """The command, running two processes; `lines` are what it has logged, by event."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.address = ""
        self.metrics_port = 0
        self.calls = 0  # made
        self._lines: list[dict[str, Any]] = []
        self._changed = asyncio.Condition()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            async with self._changed:
                self._lines.append(json.loads(line))
                self._changed.notify_all()

    async def logged(self, count: int = 1, **fields: Any) -> list[dict[str, Any]]:
        """The lines with these fields, once there are so many."""

        def found() -> list[dict[str, Any]]:
            return [line for line in self._lines if fields.items() <= line.items()]

        async with asyncio.timeout(60), self._changed:
            await self._changed.wait_for(lambda: len(found()) >= count)
        return found()

    async def ended(self) -> int:
        """The exit code, with every line read."""
        code = await self.process.wait()
        await self._reading
        return code

    def workers(self) -> list[int]:
        return [child.pid for child in psutil.Process(self.process.pid).children()]

    def metrics(self) -> dict[str, float]:
        """Values by name and the values of the labels, in the order of the labels' names."""
        with urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics") as page:
            text = page.read().decode()
        return {
            ",".join((s.name, *(s.labels[label] for label in sorted(s.labels)))): s.value
            for family in text_string_to_metric_families(text)
            for s in family.samples
        }

    def channel(self) -> grpc.aio.Channel:
        """A connection of its own, which the kernel gives to either process."""
        return grpc.aio.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)])

    async def call(self, message: bytes = b"a") -> bytes:
        self.calls += 1
        async with self.channel() as channel:
            answer: bytes = await channel.unary_unary(UNARY)(message, **CALL)
            return answer

    async def until_both_served(self) -> None:
        """Call until each process has served a call, one that began after this did."""
        before = self.calls
        served: set[int] = set()
        while len(served) < 2:
            assert await self.call() == b"a"
            lines = await self.logged(self.calls, event="call", code="OK")
            served = {line["process"] for line in lines[before:]}


@contextlib.asynccontextmanager
async def running(folder: Path, *backends: Backend, **settings: str) -> AsyncIterator[Gateway]:
    path = folder / "pools.yaml"
    path.write_text(json.dumps({"pools": [pool("reads", *backends)]}))
    gateway = Gateway(
        await start("--config", str(path), INKWELL_GATEWAY_PROCESSES="2", INKWELL_GATEWAY_METRICS_PORT="0", **settings)
    )
    try:
        (line,) = await gateway.logged(event="serving")
        gateway.address, gateway.metrics_port = line["address"], line["metrics_port"]
        yield gateway
    finally:
        with contextlib.suppress(ProcessLookupError):
            gateway.process.terminate()
        await gateway.ended()


async def test_processes_share_the_port_and_are_one_gateway_on_the_page(tmp_path: Path) -> None:
    async with backends(1) as (only,), running(tmp_path, only) as gateway:
        await gateway.until_both_served()
        found = await asyncio.to_thread(gateway.metrics)
        assert found["inkwell_gateway_requests_total,OK,inkwell.ocr.v1.OcrService/Recognize,reads"] == gateway.calls
        assert found["inkwell_gateway_endpoints,reads,ready"] == 1
        assert found["inkwell_gateway_processes,serving"] == 2
        assert found["inkwell_ready"] == 1
        for process in ("0", "1", "supervisor"):
            assert found[f"process_resident_memory_bytes,{process}"] > 1e6


async def test_a_process_that_is_killed_is_started_anew_and_nothing_counted_is_lost(tmp_path: Path) -> None:
    async with backends(1) as (only,), running(tmp_path, only) as gateway:
        await gateway.until_both_served()
        await asyncio.to_thread(gateway.metrics)  # the page holds what it has seen
        victim = gateway.workers()[0]
        os.kill(victim, signal.SIGKILL)
        (ended,) = await gateway.logged(event="process ended")
        assert ended["exit_code"] == -signal.SIGKILL
        # The other one takes what comes meanwhile.
        assert await gateway.call() == b"a"
        await gateway.logged(2, event="listening", process=ended["process"])
        await gateway.until_both_served()
        found = await asyncio.to_thread(gateway.metrics)
        assert found["inkwell_gateway_requests_total,OK,inkwell.ocr.v1.OcrService/Recognize,reads"] == gateway.calls
        assert found["inkwell_gateway_process_restarts_total"] == 1
        assert found["inkwell_gateway_processes,serving"] == 2


async def test_all_processes_answer_for_the_health_of_the_whole(tmp_path: Path) -> None:
    async with backends(1) as (only,), running(tmp_path, only) as gateway:
        async with contextlib.AsyncExitStack() as exits:
            watches = []
            for _ in range(8):
                channel = await exits.enter_async_context(gateway.channel())
                watches.append(
                    health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="readiness"))
                )
            for watch in watches:
                while (await watch.read()).status != SERVING:
                    pass
            await only.set_ready(False)
            for watch in watches:
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            await only.set_ready(True)
            for watch in watches:
                assert (await watch.read()).status == SERVING
        assert (await asyncio.to_thread(gateway.metrics))["inkwell_ready"] == 1


async def test_sigterm_lets_calls_in_every_process_finish(tmp_path: Path) -> None:
    release = asyncio.Event()
    arrived = asyncio.Semaphore(0)

    async def hold(requests: AsyncIterator[bytes], _context: Any) -> AsyncGenerator[bytes, None]:
        async for request in requests:
            arrived.release()
            await release.wait()
            yield request

    async with backends(1) as (only,), running(tmp_path, only) as gateway:
        await gateway.until_both_served()
        only.behaviour = hold
        workers = gateway.workers()
        calls = [asyncio.create_task(gateway.call(str(i).encode())) for i in range(16)]
        for _ in calls:
            await arrived.acquire()
        gateway.process.terminate()
        await gateway.logged(3, event="draining")  # the supervisor and both processes
        release.set()
        assert await asyncio.gather(*calls) == [str(i).encode() for i in range(16)]
        assert await gateway.ended() == 0
        assert not alive(workers)


async def test_a_second_signal_ends_what_does_not_drain(tmp_path: Path) -> None:
    async def never(_requests: AsyncIterator[bytes], _context: Any) -> AsyncGenerator[bytes, None]:
        await asyncio.Event().wait()
        yield b""

    async with backends(1) as (only,), running(tmp_path, only) as gateway:
        only.behaviour = never
        call = asyncio.create_task(gateway.call())
        await only.entered.wait()
        gateway.process.send_signal(signal.SIGINT)
        await gateway.logged(3, event="draining")
        gateway.process.send_signal(signal.SIGINT)
        assert await gateway.ended() == 1
        with contextlib.suppress(grpc.aio.AioRpcError):
            await call


async def test_no_process_outlives_the_supervisor(tmp_path: Path) -> None:
    async with backends(1) as (only,), running(tmp_path, only) as gateway:
        workers = gateway.workers()
        assert len(workers) == 2
        gateway.process.kill()
        for worker in workers:
            await asyncio.to_thread(wait_end, worker)


async def test_nobody_else_gets_a_share_of_the_port(tmp_path: Path) -> None:
    async with backends(1) as (only,), running(tmp_path, only) as gateway:
        path, port = str(tmp_path / "pools.yaml"), gateway.address.rpartition(":")[2]
        for processes in ("1", "2"):
            other = await start("--config", path, INKWELL_GATEWAY_PROCESSES=processes, INKWELL_GATEWAY_PORT=port)
            _, said = await other.communicate()
            assert other.returncode == 1
            assert b"is the port taken?" in said
        assert await gateway.call() == b"a"


async def test_a_gateway_whose_processes_cannot_start_says_so_and_ends(tmp_path: Path) -> None:
    path = tmp_path / "pools.yaml"
    path.write_text(
        json.dumps({"pools": [{"name": "a", "service": "ocr", "hardware": "cpu", "targets": ["127.0.0.1:1"]}]})
    )
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'services.gateway.worker' in sys.orig_argv: os._exit(3)\n"
    )
    gateway = await start("--config", str(path), INKWELL_GATEWAY_PROCESSES="2", PYTHONPATH=str(tmp_path))
    _, said = await gateway.communicate()
    assert gateway.returncode == 1
    assert json.loads(said.splitlines()[-1])["error"] == "3 processes ended before any served; the last with 3"
