"""Traces: the way of a call through gateway, service and engine, as spans that go to an OpenTelemetry collector.

Callers say which trace their call belongs to in metadata `traceparent` (https://www.w3.org/TR/trace-context/). Whether
a call is recorded is decided once, by whoever begins its trace, and passed on: by the caller, or here by the setting
`trace_ratio`. Nothing of OpenTelemetry is touched for a call that is not recorded, so that it costs some microseconds.

OpenTelemetry is the extra `tracing` and is imported only once an endpoint is set.
"""

import asyncio
import contextlib
import contextvars
import os
import random
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from inkwell.version import __version__
from services.kit.phases import Phase, Values
from services.kit.settings import ServiceSettings

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Tracer

PARENT_KEY = "traceparent"
STATE_KEY = "tracestate"

# version-trace id-parent id-flags. Versions above 00 may have more after it; ff is none.
_PARENT = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_RECORDED = 0x01

# How a server's span ends in an error, after OpenTelemetry's conventions for gRPC; the other codes are the caller's.
# https://opentelemetry.io/docs/specs/semconv/rpc/grpc/
_SERVER_ERRORS = frozenset(
    ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "ABANDONED")
)

# Steps that a span keeps as events; a text of more tokens has the rest only as a number.
STEPS_MOST = 128
_EXPORT_TIMEOUT_S = 5.0
# What the spans that have not been sent yet may take when the service ends.
_FLUSH_S = 2.0


class TracingMissingError(ImportError):
    """Traces are asked for, and the libraries for them are not installed."""


@dataclass(frozen=True, slots=True)
class Parent:
    """The span that a call was made in, elsewhere. trace_id: 32 hexadecimal digits; span_id: 16."""

    trace_id: str
    span_id: str
    recorded: bool

    @classmethod
    def read(cls, value: Any) -> "Parent | None":
        """Of a `traceparent`; None for anything that is none."""
        found = _PARENT.fullmatch(value) if isinstance(value, str) else None
        if found is None or (found[1] == "00" and found[5] is not None):
            return None
        return cls(found[2], found[3], bool(int(found[4], 16) & _RECORDED))


class Span:
    """What one call, or a part of it, takes. Of one that is not recorded there are only the ids, to pass on."""

    __slots__ = ("_otel", "_tracer", "span_id", "trace_id")

    def __init__(self, trace_id: str, span_id: str, otel: Any = None, tracer: "Tracer | None" = None) -> None:
        self.trace_id = trace_id
        self.span_id = span_id
        self._otel = otel
        self._tracer = tracer

    @property
    def recorded(self) -> bool:
        """Whether anything of it is kept."""
        return self._otel is not None

    @property
    def traceparent(self) -> str:
        """What to say to whoever is called within it."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.recorded else '00'}"

    def begin(
        self, name: str, attributes: Mapping[str, Any] | None = None, *, client: bool = False, at_ns: int | None = None
    ) -> "Span":
        """A part of it that begins now, or began at `at_ns` (Unix time). client: what is asked of another process."""
        if self._tracer is None:
            return self
        from opentelemetry.trace import SpanKind, set_span_in_context

        otel = self._tracer.start_span(
            name,
            set_span_in_context(self._otel, _empty_context()),
            kind=SpanKind.CLIENT if client else SpanKind.INTERNAL,
            attributes=attributes,
            start_time=at_ns,
        )
        return _span(otel, self._tracer)

    def past(
        self, name: str, began_ns: int, ended_ns: int | None = None, attributes: Mapping[str, Any] | None = None
    ) -> None:
        """A part of it that is over: from then until then (Unix time), or until now."""
        if self._otel is not None:
            self.begin(name, attributes, at_ns=began_ns).end(at_ns=ended_ns)

    def went_through(self, phases: Iterable[Phase]) -> None:
        """Parts of it as the engine process tells them."""
        if self._otel is None:
            return
        for phase in phases:
            part = self.begin(phase.name, _named(phase.attributes), at_ns=phase.began_ns)
            for step in phase.steps:
                part.step("step", _named(step.attributes), at_ns=step.at_ns)
            part.end(at_ns=phase.ended_ns)

    def step(self, name: str, attributes: Values | None = None, *, at_ns: int | None = None) -> None:
        """An event within it."""
        if self._otel is not None:
            self._otel.add_event(name, attributes, at_ns)

    def set(self, attributes: Mapping[str, Any]) -> None:
        """Say something of it. Empty values are left out."""
        if self._otel is not None:
            for name, value in attributes.items():
                if value not in ("", None):
                    self._otel.set_attribute(name, value)

    def end(self, error: str = "", *, at_ns: int | None = None) -> None:
        """It is over. error: why it failed, empty if it did not. Only the first end counts."""
        if self._otel is None or not self._otel.is_recording():
            return
        if error:
            from opentelemetry.trace import Status, StatusCode

            self._otel.set_status(Status(StatusCode.ERROR, error))
            self._otel.set_attribute("error.type", error)
        self._otel.end(at_ns)

    def end_call(self, code: str, *, name: str = "", server: bool = True) -> None:
        """The same for a call that ended with a gRPC code. name: to call it from now on."""
        if self._otel is None or not self._otel.is_recording():
            return
        if name:
            self._otel.update_name(name)
        self._otel.set_attribute("rpc.response.status_code", code)
        failed = code in _SERVER_ERRORS if server else code != "OK"
        self.end(code if failed else "")


_current: contextvars.ContextVar[Span | None] = contextvars.ContextVar("inkwell_span", default=None)


def current() -> Span | None:
    """The span of the call, or of the operation, that this runs in; None if traces are off."""
    return _current.get()


def set_current(span: Span | None) -> None:
    """Make it the span of the running task."""
    _current.set(span)


def current_trace_id() -> str:
    """Id of the trace that is being recorded of the running call, 32 hexadecimal digits; empty if none is."""
    span = _current.get()
    return span.trace_id if span is not None and span.recorded else ""


def traceparent() -> str:
    """What to say to whoever is called from here, empty if traces are off."""
    span = _current.get()
    return "" if span is None else span.traceparent


@contextlib.contextmanager
def part(name: str, attributes: Mapping[str, Any] | None = None) -> Iterator[None]:
    """A part of the running call, which takes as long as the block."""
    span = _current.get()
    if span is None or not span.recorded:
        yield
        return
    inner = span.begin(name, attributes)
    try:
        yield
    except BaseException as error:
        inner.end(type(error).__name__)
        raise
    inner.end()


class Tracing:
    """One server's recording. Made by `start`."""

    def __init__(self, service: str, provider: "TracerProvider", exporter: "SpanExporter", ratio: float) -> None:
        self._service = service
        self._provider = provider
        self._exporter = exporter
        self._ratio = ratio
        self._tracer = provider.get_tracer("inkwell", __version__)

    def call(self, method: str, metadata: Mapping[str, Any]) -> Span:
        """The span of a call that came in, whose path is `method`; it becomes the running task's."""
        parent = Parent.read(metadata.get(PARENT_KEY))
        recorded = parent.recorded if parent is not None else random.random() < self._ratio
        if not recorded:
            if parent is not None:
                span = Span(parent.trace_id, parent.span_id)
            else:
                span = Span(f"{random.getrandbits(128) or 1:032x}", f"{random.getrandbits(64) or 1:016x}")
        else:
            from opentelemetry.trace import SpanKind

            name = method.removeprefix("/")
            otel = self._tracer.start_span(
                name,
                _empty_context() if parent is None else _within(parent, metadata.get(STATE_KEY)),
                kind=SpanKind.SERVER,
                attributes={"rpc.system.name": "grpc", "rpc.method": name},
            )
            span = _span(otel, self._tracer)
        _current.set(span)
        return span

    def work(self, name: str, parent: Parent | None, attributes: Mapping[str, Any]) -> Span:
        """The span of work that a call asked for and did not wait for; it becomes the running task's.

        parent: the span of that call, None for work that nobody traced, and that is not recorded then.
        """
        if parent is None or not parent.recorded:
            span = Span(*((parent.trace_id, parent.span_id) if parent is not None else ("0" * 32, "0" * 16)))
        else:
            otel = self._tracer.start_span(name, _within(parent, None), attributes=attributes)
            span = _span(otel, self._tracer)
        _current.set(span)
        return span

    async def close(self) -> None:
        """Send what has not been sent, within some seconds, and end."""
        if _running.get(self._service) is self:
            del _running[self._service]
        ending = asyncio.ensure_future(asyncio.to_thread(self._provider.shutdown))
        await asyncio.wait([ending], timeout=_FLUSH_S)
        if not ending.done():
            # The collector does not answer. This ends the attempts to send, and with them the thread.
            await asyncio.to_thread(self._exporter.shutdown)
        await ending


_running: dict[str, Tracing] = {}


def of(service: str) -> Tracing | None:
    """What the server of that name records with, None if it does not."""
    return _running.get(service)


def start(service: str, settings: ServiceSettings) -> Tracing | None:
    """Begin to record as the settings say; None if they name no endpoint. Raises TracingMissingError.

    Beside the settings, OpenTelemetry's own variables count for what they are about: OTEL_RESOURCE_ATTRIBUTES, and
    OTEL_EXPORTER_OTLP_HEADERS, _CERTIFICATE, _CLIENT_KEY, _CLIENT_CERTIFICATE and _COMPRESSION.
    """
    if not settings.trace_endpoint:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import SpanLimits, TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON
    except ImportError as error:
        raise TracingMissingError(
            f"TRACE_ENDPOINT is set, and what sends traces is not installed ({error.name}):"
            " pip install 'inkwell[tracing]', or leave it empty"
        ) from error
    exporter = OTLPSpanExporter(settings.trace_endpoint, timeout=_EXPORT_TIMEOUT_S)
    provider = TracerProvider(
        sampler=ALWAYS_ON,  # what is not to be recorded does not come this far
        resource=Resource.create(
            {
                "service.namespace": "inkwell",
                "service.name": f"inkwell-{service}",
                "service.version": __version__,
                "service.instance.id": f"{os.uname().nodename}:{os.getpid()}",
            }
        ),
        span_limits=SpanLimits(max_events=STEPS_MOST, max_attribute_length=1024),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(BatchSpanProcessor(exporter))
    tracing = _running[service] = Tracing(service, provider, exporter, settings.trace_ratio)
    return tracing


def trace_id_of(metadata: Mapping[str, Any]) -> str:
    """Id of the trace that a call says it belongs to, empty if it does not say so."""
    value = metadata.get(PARENT_KEY)
    parent = None if value is None else Parent.read(value)
    return "" if parent is None else parent.trace_id


def now_ns() -> int:
    """Nanoseconds of Unix time, as spans have them."""
    return time.time_ns()


def _named(values: Values) -> dict[str, Any]:
    return {f"inkwell.{name}": value for name, value in values.items()}


def _empty_context() -> "Context":
    # Never the library's own current one: what is current here is `_current`.
    from opentelemetry.context import Context

    return Context()


def _within(parent: Parent, state: Any) -> "Context":
    from opentelemetry import trace

    context = trace.SpanContext(
        int(parent.trace_id, 16),
        int(parent.span_id, 16),
        is_remote=True,
        trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED),
        trace_state=trace.TraceState.from_header([state]) if isinstance(state, str) else None,
    )
    return trace.set_span_in_context(trace.NonRecordingSpan(context), _empty_context())


def _span(otel: Any, tracer: "Tracer") -> Span:
    context = otel.get_span_context()
    return Span(f"{context.trace_id:032x}", f"{context.span_id:016x}", otel, tracer)
