"""Several gateway processes on one port: started, kept alive, drained, and seen from outside as one gateway.

Each process listens on the port by itself (SO_REUSEPORT), and the kernel gives every new connection to one of them. The
supervisor takes no calls. It holds the port, so that nothing else can join in, starts a process anew when one ends,
adds their metrics up on one page, and tells all of them what any of them is ready for.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

import structlog
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from services.gateway.member import Link, Ready, Scrape, Scraped, Serving
from services.gateway.settings import Settings
from services.gateway.summed_metrics import Family, accumulated, collect, merge
from services.kit import logs
from services.kit.metrics import MetricsPage

log = structlog.get_logger(__name__)

_BACKOFF_FIRST_S = 0.25
_BACKOFF_MOST_S = 30.0
# A process that served for this long was well, and the next one is started without delay.
_WELL_AFTER_S = 30.0
# Processes that may end before any has ever served; then something is wrong that another try does not mend.
_FAILED_STARTS_MOST = 3
# Over the drain: for a process to end once its calls have.
_END_WITHIN_S = 10.0
# A process whose loop is held up is left out of a scrape rather than delay the page.
_SCRAPE_WITHIN_S = 2.0


class StartError(Exception):
    """No process ever came to serve."""


def process_count(settings: Settings) -> int:
    """How many processes the settings ask for; with 0, as many as there are cores for this one."""
    return settings.processes or len(os.sched_getaffinity(0))


def supervise(settings: Settings) -> None:
    """Run processes until SIGTERM or SIGINT, then drain them; a second signal kills them.

    Exits with 1 if the port is taken, no process comes to serve, or one had to be killed.
    """
    logs.configure("gateway", settings.log_level)
    try:
        drained = asyncio.run(_until_signal(Supervisor(settings)))
    except (OSError, StartError) as error:
        log.error("cannot start", error=str(error))
        raise SystemExit(1) from None
    if not drained:
        raise SystemExit(1)


async def _until_signal(supervisor: "Supervisor") -> bool:
    loop = asyncio.get_running_loop()
    signals = 0

    def on_signal() -> None:
        nonlocal signals
        signals += 1
        supervisor.drain(patient=signals == 1)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return await supervisor.run()


def claim_port(host: str, port: int) -> tuple[list[socket.socket], int]:
    """Hold the port at every address of the host, for sockets of SO_REUSEPORT of this user; answers the port.

    The sockets do not listen, so no connection ever comes to them. Raises OSError if anyone else is there, also someone
    who shares ports.
    """
    held: list[socket.socket] = []
    found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    try:
        for family, kind, protocol, _, address in found:
            claim = socket.socket(family, kind, protocol)
            held.append(claim)
            if family == socket.AF_INET6:
                claim.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            # While it is bound, only connections that linger may be on the port: so no one else shares it, whatever
            # their options. From then on it can be shared, and can no longer be had for oneself.
            claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            claim.bind((address[0], port, *address[2:]))
            claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            port = claim.getsockname()[1]
    except OSError as error:
        for claim in held:
            claim.close()
        raise OSError(f"cannot listen on {host}:{port}; is the port taken? ({error.strerror})") from error
    return held, port


class _Process:
    """One process as the supervisor knows it, from its start to its end."""

    def __init__(self, process: asyncio.subprocess.Process, link: Link) -> None:
        self.process = process
        self.link = link
        self.began = time.monotonic()
        self.serving = False
        self.ready: dict[str, bool] = {}
        self.families: list[Family] = []  # as of the last scrape
        self._scrapes: dict[int, asyncio.Future[None]] = {}
        self._scrape_number = 0

    async def scrape(self) -> None:
        """Bring `families` up to date; raises TimeoutError if the process does not answer in time."""
        self._scrape_number += 1
        number = self._scrape_number
        answer = self._scrapes[number] = asyncio.get_running_loop().create_future()
        try:
            self.link.send(Scrape(number))
            async with asyncio.timeout(_SCRAPE_WITHIN_S):
                await answer
        finally:
            del self._scrapes[number]

    def scraped(self, message: Scraped) -> None:
        """Take the answer in."""
        self.families = message.families
        answer = self._scrapes.get(message.number)
        if answer is not None and not answer.done():
            answer.set_result(None)

    def over(self) -> None:
        """Wait no longer for answers."""
        for answer in self._scrapes.values():
            if not answer.done():
                answer.set_result(None)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)


class Supervisor:
    """Runs as many processes as the settings say. Made and used on one event loop; `run` once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._count = process_count(settings)
        self._running: dict[int, _Process] = {}
        self._ended: list[Family] = []
        self._whole: dict[str, bool] = {}
        self._failed_starts = 0
        self._served = False  # some process has
        self._said_serving = False
        self._drained = True
        self._draining = asyncio.Event()
        self._impatient = asyncio.Event()
        self._port = 0
        self._metrics_port = 0
        # Filled in by the page's thread, one request at a time.
        self._registry = CollectorRegistry()
        self._own = CollectorRegistry()
        ProcessCollector(registry=self._own)
        self._restarts = Counter(
            "inkwell_gateway_process_restarts", "Times that a process was started anew.", registry=self._own
        )

    async def run(self) -> bool:
        """Return when every process has ended, after `drain`: whether all have drained and none was killed.

        Raises OSError if a port is taken, and StartError.
        """
        held, self._port = claim_port(self._settings.host, self._settings.port)
        with contextlib.ExitStack() as exits:
            for claim in held:
                exits.callback(claim.close)
            page: MetricsPage | None = None
            failed: BaseException | None = None
            if self._settings.metrics_port >= 0:
                self._registry.register(_Whole(self, asyncio.get_running_loop()))
                page = MetricsPage(self._registry, self._settings.metrics_host, self._settings.metrics_port)
                self._metrics_port = page.port
            try:
                async with asyncio.TaskGroup() as group:
                    for number in range(self._count):
                        group.create_task(self._keep(number), name=f"process {number}")
            except* StartError as errors:
                failed = errors.exceptions[0]
            finally:
                if page is not None:
                    # Elsewhere, because a request under way asks this loop for what it answers.
                    await asyncio.to_thread(page.close)
        if failed is not None:
            raise failed
        log.info("stopped")
        return self._drained

    def drain(self, *, patient: bool = True) -> None:
        """Let every process finish its calls and end; kill them unless `patient`."""
        if not self._draining.is_set():
            log.info("draining", processes=len(self._running))
            self._draining.set()
        if not patient:
            self._impatient.set()

    async def metrics(self) -> list[Metric]:
        """What the whole gateway shows now."""
        processes = dict(self._running)
        answers = await asyncio.gather(*(p.scrape() for p in processes.values()), return_exceptions=True)
        for number, answer in zip(processes, answers, strict=True):
            if isinstance(answer, BaseException):
                log.warning("no metrics", process=number, error=repr(answer))
        # One that ended meanwhile is among the ended by now.
        parts = {str(number): process.families for number, process in self._running.items()}
        states = GaugeMetricFamily("inkwell_gateway_processes", "Processes of this gateway.", labels=["state"])
        serving = sum(process.serving for process in self._running.values())
        states.add_metric(["serving"], serving)
        states.add_metric(["starting"], len(self._running) - serving)
        states.add_metric(["absent"], self._count - len(self._running))
        return [*merge({"supervisor": collect(self._own), **parts}, self._ended), states]

    async def _keep(self, number: int) -> None:
        """Start a process, and another when it ends, until the gateway drains."""
        delay_s = _BACKOFF_FIRST_S
        while not self._draining.is_set():
            began = time.monotonic()
            try:
                code, served = await self._one(number)
            except OSError as error:  # no more processes, memory or descriptors now
                log.error("cannot start a process", process=number, error=str(error))
                code, served = -1, False
            if self._draining.is_set():
                return
            log.error("process ended", process=number, exit_code=code, served=served)
            if not self._served:
                self._failed_starts += 1
                if self._failed_starts >= _FAILED_STARTS_MOST:
                    raise StartError(f"{self._failed_starts} processes ended before any served; the last with {code}")
            if served and time.monotonic() - began >= _WELL_AFTER_S:
                delay_s = _BACKOFF_FIRST_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._draining.wait()
            delay_s = min(2 * delay_s, _BACKOFF_MOST_S)
            if not self._draining.is_set():
                self._restarts.inc()

    async def _one(self, number: int) -> tuple[int, bool]:
        """One process from start to end; answers its exit code and whether it ever served."""
        process = await self._spawn(number)
        self._running[number] = process
        talking = asyncio.create_task(self._talk(process), name=f"talk {number}")
        ending = asyncio.create_task(self._end_on_drain(process), name=f"end {number}")
        try:
            code = await process.process.wait()
            # What it said last is still to be read; the socket ends with the process.
            await talking
        finally:
            for task in (talking, ending):
                task.cancel()
            await asyncio.gather(talking, ending, return_exceptions=True)
            process.over()
            process.link.close()
            process.signal(signal.SIGKILL)
            await process.process.wait()
            del self._running[number]
            self._ended = accumulated((self._ended, process.families))
            self._share_ready()
        return code, process.serving

    async def _spawn(self, number: int) -> _Process:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                started = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "services.gateway.worker",
                    str(number),
                    str(theirs.fileno()),
                    env={
                        **os.environ,
                        "INKWELL_GATEWAY_CONFIG": str(self._settings.config),
                        "INKWELL_GATEWAY_PORT": str(self._port),
                        "INKWELL_GATEWAY_METRICS_PORT": "-1",
                    },
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    # Ctrl-C is for the supervisor, which passes it on: a second signal would end them at once.
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        return _Process(started, await Link.over(ours))

    async def _talk(self, process: _Process) -> None:
        async for message in process.link.received():
            if isinstance(message, Scraped):
                process.scraped(message)
            elif isinstance(message, Ready):
                process.ready = message.names
                self._share_ready()
                process.link.send(Ready(self._whole))  # it may be new, and the others know already
            elif isinstance(message, Serving):
                process.serving = self._served = True
                if not self._said_serving and sum(p.serving for p in self._running.values()) == self._count:
                    self._said_serving = True
                    log.info(
                        "serving",
                        address=f"{self._settings.host}:{self._port}",
                        processes=self._count,
                        metrics_port=self._metrics_port or None,
                    )

    async def _end_on_drain(self, process: _Process) -> None:
        await self._draining.wait()
        process.signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_delay_s + self._settings.drain_grace_s + _END_WITHIN_S):
                await self._impatient.wait()
        log.warning("killing a process that has not drained", pid=process.process.pid)
        self._drained = False
        process.signal(signal.SIGKILL)

    def _share_ready(self) -> None:
        names = {name for process in self._running.values() for name in process.ready}
        whole = {name: any(p.ready.get(name, False) for p in self._running.values()) for name in names}
        if whole == self._whole:
            return
        self._whole = whole
        for process in self._running.values():
            process.link.send(Ready(whole))


class _Whole(Collector):
    """The page's view, from the page's thread."""

    def __init__(self, supervisor: Supervisor, loop: asyncio.AbstractEventLoop) -> None:
        self._supervisor = supervisor
        self._loop = loop
        self._one_at_a_time = threading.Lock()

    def describe(self) -> Iterator[Metric]:
        """Nothing in advance: registering it must not ask processes that do not run yet."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        with self._one_at_a_time:
            asking = asyncio.run_coroutine_threadsafe(self._supervisor.metrics(), self._loop)
            yield from asking.result(2 * _SCRAPE_WITHIN_S)
