"""A grpc.aio server as every service runs it: health, reflection, channelz, metrics page, drain on SIGTERM."""

import asyncio
import contextlib
import functools
import gc
import signal
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import structlog
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.kit import device_metrics, identity, logs, orca, tracing
from services.kit.boundary import Boundary, Guard
from services.kit.engine_host import EngineHost, EngineStartError
from services.kit.listening import Listening
from services.kit.metrics import Metrics, MetricsPage
from services.kit.settings import ServiceSettings, is_loopback
from services.kit.tls import TlsFolder

log = structlog.get_logger(__name__)

LIVENESS = "liveness"
READINESS = "readiness"
# Our own check answers precisely up to here; beyond, gRPC itself refuses before the message is read into memory.
_CORE_LIMIT_FACTOR = 4
# To tell the callers that are refused at the very end; those who write a stream of requests are heard out for a second.
_REFUSED_WITHIN_S = 2.0
# On the port for probes: those of a kubelet are few, and nobody else has any business there.
_PROBES_AT_A_TIME = 64


class Health:
    """What grpc.health.v1 says. Changes are applied in order, also when made outside a coroutine."""

    def __init__(self) -> None:
        self.servicer = health.aio.HealthServicer()
        self._wanted: dict[str, bool] = {"": False, LIVENESS: True, READINESS: False}
        self._changed = asyncio.Event()
        self._changed.set()
        self._task: asyncio.Task[None] | None = None

    def set(self, name: str, serving: bool) -> None:
        """Say whether `name` ("readiness", a full service name, or "" for the whole) is serving."""
        self._wanted[name] = serving
        self._changed.set()

    async def start(self) -> None:
        """Publish the first state, before the server takes its first call, and follow changes from then on."""
        await self._publish()
        self._task = asyncio.create_task(self._follow(), name="health")

    async def stop(self) -> None:
        """Say NOT_SERVING of everything, for good."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self.servicer.enter_graceful_shutdown()

    async def _follow(self) -> None:
        while True:
            await self._changed.wait()
            await self._publish()

    async def _publish(self) -> None:
        self._changed.clear()
        for name, serving in list(self._wanted.items()):
            status = health_pb2.HealthCheckResponse
            await self.servicer.set(name, status.SERVING if serving else status.NOT_SERVING)


class ServiceServer:
    """One service's front process.

    register: adds the servicers to the server and answers their full service names, which reflection lists and whose
    health follows the engine's readiness. host: None for a service without an engine, which sets its own health.
    on_drain: called once no new call is taken, to end calls that would otherwise go on for the whole grace.
    lifespan: entered before the server takes its first call and left after it has ended its last one.
    interceptors: between the boundary, which makes statuses of the faults that they raise, and the handlers.
    guard: lets calls in or refuses them, and finds out who makes them; the settings' `callers` decide if it is None.
    devices: show the GPUs, or the memory, that this service computes with.
    share_port: listen beside other processes of the same user that do so too; the port must be free otherwise.
    """

    def __init__(
        self,
        name: str,
        settings: ServiceSettings,
        *,
        metrics: Metrics,
        host: EngineHost | None,
        register: Callable[[grpc.aio.Server], Sequence[str]],
        lifespan: Callable[[Health], contextlib.AbstractAsyncContextManager[None]] | None = None,
        on_drain: Callable[[], None] | None = None,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        devices: bool = False,
        share_port: bool = False,
        guard: Guard | None = None,
    ) -> None:
        self.name = name
        self.settings = settings
        self.metrics = metrics
        self.host = host
        self.port = 0
        self.metrics_port = 0
        self.health_port = 0
        metrics.drains_within(settings.drain_delay_s + settings.drain_grace_s)
        self.health = Health()
        self._register = register
        self._lifespan = lifespan
        self._on_drain = on_drain
        self._interceptors = tuple(interceptors)
        self._devices = devices
        self._share_port = share_port
        admission = host.admission if host is not None else None
        self._boundary = Boundary(metrics, max_message_bytes=settings.max_message_bytes, admission=admission)
        self._boundary.guard = guard or identity.guard(
            encrypted=settings.tls_folder is not None and settings.tls_clients, allowed=settings.callers
        )
        self._server: Listening | None = None
        self._exits = contextlib.AsyncExitStack()

    async def start(self) -> None:
        """Listen and start the engine; returns while the engine still loads. Raises OSError if a port is taken."""
        settings = self.settings
        names: list[str] = []

        def make(port: int) -> tuple[grpc.aio.Server, int]:
            server = self._made()
            names[:] = self._serve(server)
            return server, self._listen(server, port)

        try:
            server = Listening(make, settings.port, grace_s=settings.drain_grace_s)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {settings.host}:{settings.port}; is the port taken?") from error
        self.port = server.port
        if settings.tls_folder is None:
            log.warning(
                "plain text: whoever can connect may call and may read along"
                + (" (this machine only)" if is_loopback(settings.host) else ""),
                address=f"{settings.host}:{settings.port}",
                instead="set TLS to a folder of certificates",
            )
        else:
            folder = TlsFolder(settings.tls_folder)
            self.metrics.follow_certificate(lambda: folder.current().expires.timestamp())

        async with contextlib.AsyncExitStack() as exits:
            if settings.metrics_port >= 0:
                if self._devices:
                    device_metrics.register(self.metrics.registry, await asyncio.to_thread(device_metrics.find))
                page = MetricsPage(self.metrics.registry, settings.metrics_host, settings.metrics_port)
                # Closing waits for the page's thread, which looks up every half second.
                exits.push_async_callback(asyncio.to_thread, page.close)
                self.metrics_port = page.port
            self._boundary.tracing = recording = tracing.start(self.name, settings)
            if recording is not None:
                exits.push_async_callback(recording.close)
            if self.host is not None:
                self._follow_engine(self.host, names)
                await self.host.start()
                exits.push_async_callback(self.host.stop)
            if self._lifespan is not None:
                await exits.enter_async_context(self._lifespan(self.health))
            await self.health.start()
            if settings.health_port >= 0:
                await self._answer_probes(exits)
            await server.start()
            self._exits = exits.pop_all()
        self._server = server
        log.info("listening", address=f"{settings.host}:{self.port}", metrics_port=self.metrics_port or None)

    def _made(self) -> grpc.aio.Server:
        settings = self.settings
        return grpc.aio.server(
            interceptors=[self._boundary, *self._interceptors],
            options=[
                ("grpc.max_receive_message_length", settings.max_message_bytes * _CORE_LIMIT_FACTOR),
                ("grpc.max_send_message_length", -1),
                # Unless it is meant, a second server on the same port would silently take half of the calls.
                ("grpc.so_reuseport", int(self._share_port)),
                # Let clients look for a dead connection every 10 s, also between calls. Core's own bound is 5 minutes.
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.keepalive_permit_without_calls", 1),
                # A client that vanished without a word would keep its calls under way until their deadlines.
                ("grpc.keepalive_time_ms", int(settings.client_keepalive_time_s * 1000)),
                ("grpc.keepalive_timeout_ms", int(settings.client_keepalive_timeout_s * 1000)),
                # Of other pings, whose answer a probe waits for; a minute by default.
                ("grpc.http2.ping_timeout_ms", int(settings.client_keepalive_timeout_s * 1000)),
                ("grpc.http2.max_pings_without_data", 0),
            ],
        )

    def _serve(self, server: grpc.aio.Server) -> list[str]:
        """Register everything; answers the full names of the servicers."""
        # Methods are found by their path. For those that are registered besides, as generated code does, grpc.aio waits
        # one by one, and anew for every call.
        server.add_registered_method_handlers = lambda *_: None
        names = list(self._register(server))
        health_pb2_grpc.add_HealthServicer_to_server(self.health.servicer, server)
        channelz.add_channelz_servicer(server)
        if self.host is not None:
            orca.register(server, functools.partial(orca.load_of, self.host.admission))
        described = [*names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name]
        reflection.enable_server_reflection([*described, reflection.SERVICE_NAME], server)
        return names

    def _listen(self, server: grpc.aio.Server, port: int) -> int:
        address = f"{self.settings.host}:{port}"
        if self.settings.tls_folder is None:
            return int(server.add_insecure_port(address))
        credentials = TlsFolder(self.settings.tls_folder).server_credentials(require_clients=self.settings.tls_clients)
        return int(server.add_secure_port(address, credentials))

    async def _answer_probes(self, exits: contextlib.AsyncExitStack) -> None:
        """Serve health alone, in plain text, until the exits close; raises OSError if the port is taken."""
        settings = self.settings

        def make(port: int) -> tuple[grpc.aio.Server, int]:
            server = grpc.aio.server(
                options=[("grpc.so_reuseport", int(self._share_port))], maximum_concurrent_rpcs=_PROBES_AT_A_TIME
            )
            health_pb2_grpc.add_HealthServicer_to_server(self.health.servicer, server)
            return server, server.add_insecure_port(f"{settings.host}:{port}")

        try:
            server = Listening(make, settings.health_port, grace_s=0)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {settings.host}:{settings.health_port}; is the port taken?") from error
        self.health_port = server.port
        await server.start()
        exits.push_async_callback(server.stop, None)

    async def wait_ready(self) -> None:
        """Return when the engine is ready for calls; at once without an engine."""
        if self.host is not None:
            await self.host.wait_ready()

    async def stop(self, grace_s: float | None = None) -> None:
        """Drain and end: NOT_SERVING, a pause for load balancers, refuse new calls, finish the admitted, the engine.

        grace_s: seconds that admitted calls may take, the setting's when None; what is not done then is cancelled.
        """
        if self._server is None:
            return
        server, self._server = self._server, None
        log.info("draining")
        self.metrics.draining()
        await self.health.stop()
        self.metrics.ready.set(0)
        await asyncio.sleep(self.settings.drain_delay_s)
        self._boundary.draining = True
        if self._on_drain is not None:
            self._on_drain()
        try:
            async with asyncio.timeout(self.settings.drain_grace_s if grace_s is None else grace_s):
                await self._boundary.wait_idle()
        except TimeoutError:
            log.warning("grace is over; cancelling what is left")
        # From here on clients send new calls elsewhere, so that the last of those that are refused can be told so.
        stopping = asyncio.create_task(server.stop(_REFUSED_WITHIN_S))
        await asyncio.sleep(0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REFUSED_WITHIN_S):
                await self._boundary.wait_refused()
        self._boundary.stopping = True
        await server.stop(None)
        await stopping
        # stop() may return before handlers have run their `finally` blocks (grpc#37239), and those need the engine.
        await self._boundary.wait_idle()
        await self._exits.aclose()
        log.info("stopped")

    def _follow_engine(self, host: EngineHost, names: Sequence[str]) -> None:
        def changed(ready: bool) -> None:
            self.metrics.ready.set(1 if ready else 0)
            for name in ("", READINESS, *names):
                self.health.set(name, ready)

        host.on_ready_change = changed
        changed(host.ready)


def run(server: ServiceServer) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends at once.

    Exits with 1 if it cannot start: the port is taken, or the engine fails again and again before it was ever ready.
    """
    import uvloop  # here, so that tests may run on the standard loop

    logs.configure(server.name, server.settings.log_level)
    try:
        uvloop.run(_serve_until_signal(server))
    except (OSError, EngineStartError, tracing.TracingMissingError) as error:
        log.error("cannot start", error=str(error))
        raise SystemExit(1) from None


async def _serve_until_signal(server: ServiceServer) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        # The next one takes the default action: no more patience.
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    await server.start()
    # What is there now stays. Looking through it again and again for garbage is a good part of what a call costs.
    gc.collect()
    gc.freeze()
    try:
        waits: list[asyncio.Task[Any]] = [asyncio.create_task(stopping.wait(), name="signal")]
        if server.host is not None:
            waits.append(asyncio.create_task(server.host.start_failed(), name="engine-start"))
        done, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        for task in done:
            task.result()
    finally:
        await server.stop()
