"""An OpenTelemetry collector in this process: takes spans over OTLP/gRPC and shows them as trees.

What a server has recorded is here once the server has stopped, for it sends the rest then.
"""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2


@dataclass(frozen=True)
class Seen:
    """A span that arrived. Ids are hexadecimal; parent is empty for the first of a trace. events: names and values."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    kind: str
    began_ns: int
    ended_ns: int
    attributes: dict[str, Any]
    events: list[tuple[str, dict[str, Any]]]
    error: str


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.spans: list[Seen] = []
        self.endpoint = ""

    def Export(self, request: Any, context: Any) -> Any:
        for of_resource in request.resource_spans:
            service = _values(of_resource.resource.attributes)["service.name"]
            for scope in of_resource.scope_spans:
                self.spans += [_seen(service, span) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def one(self, name: str, service: str = "") -> Seen:
        """The only span of that name, and of that service if one is given."""
        (found,) = self.named(name, service)
        return found

    def named(self, name: str, service: str = "") -> list[Seen]:
        """Spans of that name, oldest first."""
        found = [span for span in self.spans if span.name == name and service in ("", span.service)]
        return sorted(found, key=lambda span: span.began_ns)

    def parts(self, span: Seen) -> list[str]:
        """Names of its children, oldest first."""
        found = [child for child in self.spans if child.parent == span.id and child.trace == span.trace]
        return [child.name for child in sorted(found, key=lambda child: (child.began_ns, child.ended_ns))]


def _seen(service: str, span: Any) -> Seen:
    failed = span.status.code == trace_pb2.Status.STATUS_CODE_ERROR
    return Seen(
        service,
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        _values(span.attributes),
        [(event.name, _values(event.attributes)) for event in span.events],
        span.status.message if failed else "",
    )


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    """A collector that listens on a port of loopback, its `endpoint`."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait()
