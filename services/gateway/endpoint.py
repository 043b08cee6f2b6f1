"""One address that serves calls: its channel, its health, and its load as this gateway sees it."""

import asyncio
import enum
import functools
import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health_pb2

from services.gateway import reports
from services.gateway.ejection import EjectionRules, Record, speaks_against
from services.gateway.metadata import ENDPOINT_KEY, HARDWARE_KEY, POOL_KEY, Metadata, Pair
from services.gateway.methods import Method
from services.gateway.selectors import Report
from services.kit import orca
from services.kit.tls import TlsFolder

log = structlog.get_logger(__name__)

_WATCH = "/grpc.health.v1.Health/Watch"
_CHECK = "/grpc.health.v1.Health/Check"
_CHECK_WITHIN_S = 2.0
_READINESS = health_pb2.HealthCheckRequest(service="readiness")
_RECONNECT_FIRST_S = 0.1
_RECONNECT_MOST_S = 2.0
# Calls under way when certificates are renewed may go on for so long.
_OLD_CONNECTION_S = 3600.0


class State(enum.StrEnum):
    """Whether an endpoint is given calls; as in gateway.proto."""

    CONNECTING = "connecting"  # not reached yet
    READY = "ready"
    NOT_READY = "not_ready"  # reached, and says so: loading, or draining
    NOT_SELECTED = "not_selected"  # ready, but not what its pool is for
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True)
class ChannelOptions:
    """How channels to endpoints are made; times in seconds.

    tls: None for plain text. server_name: that every endpoint's certificate has; empty for that of its target.
    """

    connect_timeout_s: float = 3.0
    keepalive_time_s: float = 20.0
    keepalive_timeout_s: float = 5.0
    tls: TlsFolder | None = None
    server_name: str = ""

    def open(self, address: str, server_name: str) -> grpc.aio.Channel:
        """A channel to an address, whose certificate has to have the name; empty for that of the address."""
        if self.tls is None:
            return grpc.aio.insecure_channel(address, options=self.arguments())
        arguments: list[tuple[str, int | str]] = [*self.arguments()]
        name = self.server_name or server_name
        if name:
            arguments.append(("grpc.ssl_target_name_override", name))
        return grpc.aio.secure_channel(address, self.tls.channel_credentials(), options=arguments)

    def arguments(self) -> list[tuple[str, int]]:
        """As grpc wants them."""
        return [
            # Retries are ours, elsewhere; and what comes in was measured against our own limit.
            ("grpc.enable_retries", 0),
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            # A connection each, so that the backoff of one pool is not that of another.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", int(_RECONNECT_FIRST_S * 1000)),
            ("grpc.max_reconnect_backoff_ms", int(_RECONNECT_MOST_S * 1000)),
            ("grpc.min_reconnect_backoff_ms", int(self.connect_timeout_s * 1000)),
            ("grpc.keepalive_time_ms", int(self.keepalive_time_s * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.keepalive_timeout_s * 1000)),
            # What really ends a connection whose probe is not answered; a minute if it is not set.
            ("grpc.http2.ping_timeout_ms", int(self.keepalive_timeout_s * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            # An endpoint is a machine of our own network, never behind the proxy of the environment.
            ("grpc.enable_http_proxy", 0),
        ]


class Endpoint:
    """One address of one pool. Made and used on one event loop.

    on_change: called with the endpoint after its state changed, or how many calls it says it works on at a time.
    on_failure: after a call failed in a way that speaks against it, while it says that it is ready. load_interval_s:
    seconds between the load reports that are asked of it. misplaced: why an endpoint with this report may not be used
    here, "" if it may.
    """

    def __init__(
        self,
        address: str,
        *,
        pool: str,
        hardware: str,
        options: ChannelOptions,
        server_name: str = "",
        on_change: Callable[["Endpoint"], None],
        on_failure: Callable[["Endpoint"], None] = lambda _endpoint: None,
        ejection: EjectionRules | None = None,
        load_interval_s: float = orca.USUAL_INTERVAL_S,
        misplaced: Callable[[Report | None], str] = lambda _report: "",
    ) -> None:
        self.address = address
        self.pool = pool
        self.hardware = hardware
        self.state = State.CONNECTING
        self.in_flight = 0
        self.calls = 0
        self.unavailable = 0
        self.last_error = ""
        self._was_ready = False
        self.turn = 0  # when it was chosen last, in choices; the smallest is longest ago
        # What a reply's header says of who served it.
        self.served: Metadata = ((POOL_KEY, pool), (ENDPOINT_KEY, address), (HARDWARE_KEY, hardware))
        self.report: Report | None = None  # what it says of itself; None before that, and of an older service
        self.too_large: set[str] = set()  # models that it refused as too large for it, since its last report
        self._misplaced = misplaced
        self._reports: asyncio.Task[None] | None = None
        # Times are of time.monotonic. What the endpoint last said of its load, when, and how many calls of ours were
        # under way there then.
        self.load: orca.Load | None = None
        self.heard_at = -math.inf
        self.in_flight_then = 0
        self.reporting = False  # it streams load reports, so their absence means something
        self.ready_at = -math.inf  # since when it is ready, or back after it was left out
        self.record = Record(ejection or EjectionRules())
        self._load_interval_s = load_interval_s
        self._following: asyncio.Task[None] | None = None
        self._on_change = on_change
        self._on_failure = on_failure
        self._open = functools.partial(options.open, address, server_name)
        self._channel = self._open()
        self._stubs: dict[str, Any] = {}
        self._watching: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def was_ready(self) -> bool:
        """Whether it ever was, since this gateway knows it."""
        return self._was_ready

    @property
    def store(self) -> str:
        """Which store its operations are in: endpoints of the same answer know the same ones."""
        reported = self.report.operations_store if self.report is not None else ""
        return reported or self.address

    def start(self) -> None:
        """Begin to follow the endpoint's readiness and reports."""
        if self._reports is None:
            reading = reports.follow(self._channel, self._reported)
            self._reports = asyncio.create_task(reading, name=f"report {self.pool} {self.address}")
        self._watching = asyncio.create_task(self._watch(), name=f"watch {self.pool} {self.address}")

    async def close(self) -> None:
        """Stop following it and close the connection; calls still under way there are cancelled."""
        for task in (self._watching, self._following, self._reports):
            if task is not None:
                task.cancel()
                self._ending.add(task)
        await asyncio.gather(*self._ending, return_exceptions=True)
        await self._channel.close()

    def renew(self) -> None:
        """Connect anew, with the certificate as it is now; calls under way end on the connection they have."""
        old, self._channel = self._channel, self._open()
        self._stubs.clear()
        if self._reports is not None:
            self._reports.cancel()
            self._ending.add(self._reports)
            self._reports.add_done_callback(self._ending.discard)
            self._reports = None
        self._watch_anew()
        self._follow_load_anew()
        leaving = asyncio.create_task(old.close(_OLD_CONNECTION_S), name=f"renew {self.address}")
        self._ending.add(leaving)
        leaving.add_done_callback(self._ending.discard)

    async def drained(self) -> None:
        """Return when no call of ours is under way there."""
        await self._idle.wait()

    def stub(self, method: Method) -> Any:
        """The multicallable of a method, bytes in and bytes out."""
        stub = self._stubs.get(method.path)
        if stub is None:
            kind = ("unary", "stream")
            make = getattr(self._channel, f"{kind[method.request_streaming]}_{kind[method.response_streaming]}")
            stub = make(method.path)
            if method.known:  # others are not kept: callers make them up
                self._stubs[method.path] = stub
        return stub

    def begin(self, turn: int) -> None:
        """Count a call in; every `begin` is followed by one `end`."""
        self.turn = turn
        self.calls += 1
        self.in_flight += 1
        self._idle.clear()

    def end(self) -> None:
        """Count a call out."""
        self.in_flight -= 1
        if self.in_flight == 0:
            self._idle.set()

    def answered(self, trailing: Iterable[Pair]) -> None:
        """Note a call that ended well, which is still counted in, and the load that its trailers report."""
        self._learn(trailing, self.in_flight - 1)
        self._well()

    def failed(self, error: grpc.aio.AioRpcError, *, silence_is_fine: bool = False) -> None:
        """Note a call that ended in an error, and has been counted out.

        If the connection is gone, the endpoint is unreachable from now on, before the watch finds out. silence_is_fine:
        that the deadline passed says nothing against it, such as when it had begun to answer.
        """
        trailing = error.trailing_metadata() or ()
        self._learn(trailing, self.in_flight)
        code, said_by_server = error.code(), len(trailing) > 0
        if code is grpc.StatusCode.UNAVAILABLE:
            self.unavailable += 1
            self.last_error = error.details() or ""
            gone = self._channel.get_state() is not grpc.ChannelConnectivity.READY
            if self.state is State.READY and gone and not said_by_server:
                self._set(State.UNREACHABLE, self.last_error)
                self._watch_anew()
        if self.state is not State.READY:
            return  # it is known to be away, and that is all there is to it
        bad = speaks_against(code, said_by_server=said_by_server or silence_is_fine)
        if bad:
            if code is not grpc.StatusCode.UNAVAILABLE:
                self.last_error = f"{code.name}: {error.details()}"
            self._badly()
        elif bad is not None:
            self._well()

    def kept_silent(self) -> None:
        """Note a call whose deadline passed without a word from the endpoint, and that has been counted out."""
        if self.state is State.READY:
            self.last_error = "a deadline passed without a word from it"
            self._badly()

    async def serves(self) -> bool:
        """Ask it anew, over and above the watch, whether it is ready."""
        check = self._channel.unary_unary(
            _CHECK,
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            answer = await check(_READINESS, timeout=_CHECK_WITHIN_S)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def _badly(self) -> None:
        self.record.failed(time.monotonic())
        self._on_failure(self)

    def _well(self) -> None:
        now = time.monotonic()
        if self.record.succeeded(now):
            log.info("endpoint is back", pool=self.pool, address=self.address)
            self.ready_at = now
            self._on_change(self)

    def _learn(self, trailing: Iterable[Pair], in_flight: int) -> None:
        for key, value in trailing:
            if key == orca.LOAD_KEY and isinstance(value, bytes):
                load = orca.decode(value)
                if load is not None:
                    self._heard(load, in_flight)

    def _heard(self, load: orca.Load, in_flight: int) -> None:
        before, self.load = self.load, load
        self.heard_at, self.in_flight_then = time.monotonic(), in_flight
        if before is None or before.slots != load.slots or (load.call_s and not before.call_s):
            self._on_change(self)

    async def _follow_load(self) -> None:
        # Beside the trailers of calls: those say nothing of an endpoint that is given none, and its load may be other
        # gateways' doing.
        stream = self._channel.unary_stream(orca.STREAM)
        while True:
            try:
                async for data in stream(orca.request(self._load_interval_s)):
                    load = orca.decode(data)
                    if load is None:
                        log.warning("load report not understood", pool=self.pool, address=self.address)
                        self.reporting = False
                        return
                    self.reporting = True
                    self._heard(load, self.in_flight)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    self.reporting = False
                    return
            await asyncio.sleep(self._load_interval_s * random.uniform(0.8, 1.2))

    def _follow_load_anew(self) -> None:
        if self._following is not None:
            self._following.cancel()
            self._ending.add(self._following)
            self._following.add_done_callback(self._ending.discard)
            self._following = None
        if self.state is State.READY:
            self.load, self.heard_at = None, time.monotonic()
            self._following = asyncio.create_task(self._follow_load(), name=f"watch load {self.pool} {self.address}")

    def _watch_anew(self) -> None:
        # The old watch may not notice: only some of its connection's streams were cut.
        if self._watching is not None:
            old = self._watching
            old.cancel()
            self._ending.add(old)
            old.add_done_callback(self._ending.discard)
            self.start()

    async def _watch(self) -> None:
        watch = self._channel.unary_stream(
            _WATCH,
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        delay = _RECONNECT_FIRST_S
        # The first try fails fast and says why; later ones wait for the connection, so that they are there with it.
        patient = False
        while True:
            try:
                async for answer in watch(_READINESS, wait_for_ready=patient):
                    delay = _RECONNECT_FIRST_S
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        self._set(State.READY)
                    else:
                        name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
                        self._set(State.NOT_READY, f"readiness is {name}")
                self._set(State.NOT_READY, "it ended the health watch")
                patient = False
            except grpc.aio.AioRpcError as error:
                details = f"{error.code().name}: {error.details()}"
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    self._set(State.NOT_READY, "it has no grpc.health.v1 service to ask")
                else:
                    self._set(State.UNREACHABLE, details)
                patient = not patient
            # Spread, so that gateways do not come back all at once.
            await asyncio.sleep(delay * random.uniform(0.8, 1.2))
            delay = min(delay * 2, _RECONNECT_MOST_S)

    def _reported(self, report: Report | None) -> None:
        self.report = report
        self.too_large.clear()
        if self.state in (State.READY, State.NOT_SELECTED):
            self._set(State.READY)
        self._on_change(self)

    def _set(self, state: State, error: str = "") -> None:
        if state is State.READY and (why := self._misplaced(self.report)):
            state, error = State.NOT_SELECTED, why
        if error:
            self.last_error = error
        if state is self.state:
            return
        log.info("endpoint", pool=self.pool, address=self.address, state=state.value, error=error or None)
        if state is State.READY and not self._was_ready:
            # What stood in the way while it started is no news any more.
            self._was_ready, self.last_error = True, ""
        self.state = state
        if state is State.READY:
            self.ready_at = time.monotonic()
        self._follow_load_anew()
        self._on_change(self)
