"""Load reports as gRPC's ORCA has them: written into the trailers of every call, and streamed to who asks.

The messages are xds.data.orca.v3.OrcaLoadReport and xds.service.orca.v3.OrcaLoadReportRequest. They are declared here,
field numbers as published, in a pool of their own: the package xds-protos brings its own google/rpc and
google/longrunning modules, which replace those of googleapis-common-protos and fit no other user of them.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, duration_pb2, message_factory
from google.protobuf.message import DecodeError

from services.kit.admission import Admission

ORCA_KEY = "endpoint-load-metrics-bin"  # ORCA's name of the trailer
# The same under a name of ours: gRPC's core sends the one above, but keeps it from the program that receives it.
LOAD_KEY = "inkwell-load-bin"
SERVICE = "xds.service.orca.v3.OpenRcaService"
STREAM = f"/{SERVICE}/StreamCoreMetrics"
# Reports are small, but a caller may ask for one every nanosecond.
SHORTEST_INTERVAL_S = 0.1
# For callers that say no interval: a load balancer's view may be this old without harm.
USUAL_INTERVAL_S = 1.0
LONGEST_INTERVAL_S = 3600.0

_SLOTS = "inkwell.slots"
_RUNNING = "inkwell.running"
_WAITING = "inkwell.waiting"
_WAIT_S = "inkwell.wait_s"
_CALL_S = "inkwell.call_s"


@dataclass(frozen=True, slots=True)
class Load:
    """What a service's queue looks like.

    slots: calls that are worked on at a time, at least 1. running, waiting: calls in and before them. wait_s: seconds
    that a call which comes now is expected to wait. call_s: seconds that a call takes in a slot; 0 while not known.
    """

    slots: int
    running: int
    waiting: int
    wait_s: float
    call_s: float


def load_of(admission: Admission) -> Load:
    """The load of an engine's queue, now."""
    return Load(
        slots=admission.slots,
        running=admission.running_count,
        waiting=admission.waiting_count,
        wait_s=admission.expected_wait_s(),
        call_s=admission.seconds_per_call(),
    )


def encode(load: Load) -> bytes:
    """A serialized OrcaLoadReport: its own utilization (above 1: calls wait), and ours under names `inkwell.*`."""
    report = _Report(application_utilization=(load.running + load.waiting) / load.slots)
    named = report.named_metrics
    named[_SLOTS] = load.slots
    named[_RUNNING] = load.running
    named[_WAITING] = load.waiting
    named[_WAIT_S] = load.wait_s
    named[_CALL_S] = load.call_s
    data: bytes = report.SerializeToString()
    return data


def decode(data: bytes) -> Load | None:
    """Read a serialized OrcaLoadReport; None if it is none, or has not all of our values, or has impossible ones."""
    try:
        named = _Report.FromString(data).named_metrics
    except DecodeError:
        return None
    values = [named[name] for name in (_SLOTS, _RUNNING, _WAITING, _WAIT_S, _CALL_S) if name in named]
    if len(values) < 5 or not all(math.isfinite(v) and 0 <= v <= 1e9 for v in values) or values[0] < 1:
        return None
    slots, running, waiting, wait_s, call_s = values
    return Load(int(slots), int(running), int(waiting), wait_s, call_s)


def trailers(admission: Admission) -> tuple[tuple[str, bytes], ...]:
    """The trailers that report the load of an engine's queue, now."""
    report = encode(load_of(admission))
    return ((ORCA_KEY, report), (LOAD_KEY, report))


def request(interval_s: float) -> bytes:
    """A serialized OrcaLoadReportRequest for one report every so many seconds."""
    wanted = _Request()
    wanted.report_interval.FromNanoseconds(round(interval_s * 1e9))
    data: bytes = wanted.SerializeToString()
    return data


def register(server: grpc.aio.Server, current: Callable[[], Load]) -> None:
    """Serve OpenRcaService: the first report at once, and then one every interval that the caller asked for.

    Intervals are held between 0.1 s and an hour; without one it is a second.
    """

    async def stream(wanted: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        interval_s = _interval_s(wanted)
        while True:
            yield encode(current())
            await asyncio.sleep(interval_s)

    handler = grpc.unary_stream_rpc_method_handler(stream, request_deserializer=_Request.FromString)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"StreamCoreMetrics": handler}),))


def _interval_s(wanted: Any) -> float:
    if not wanted.HasField("report_interval"):
        return USUAL_INTERVAL_S
    asked: float = wanted.report_interval.seconds + wanted.report_interval.nanos / 1e9
    return min(max(asked, SHORTEST_INTERVAL_S), LONGEST_INTERVAL_S)


def _messages() -> tuple[Any, Any]:
    kinds = descriptor_pb2.FieldDescriptorProto
    pool = descriptor_pool.DescriptorPool()
    duration = descriptor_pb2.FileDescriptorProto()
    duration_pb2.DESCRIPTOR.CopyToProto(duration)
    pool.Add(duration)

    data = descriptor_pb2.FileDescriptorProto(name="orca_load_report", package="xds.data.orca.v3", syntax="proto3")
    report = data.message_type.add(name="OrcaLoadReport")
    for name, number, kind in (
        ("cpu_utilization", 1, kinds.TYPE_DOUBLE),
        ("mem_utilization", 2, kinds.TYPE_DOUBLE),
        ("rps", 3, kinds.TYPE_UINT64),
        ("rps_fractional", 6, kinds.TYPE_DOUBLE),
        ("eps", 7, kinds.TYPE_DOUBLE),
        ("application_utilization", 9, kinds.TYPE_DOUBLE),
    ):
        report.field.add(name=name, number=number, type=kind, label=kinds.LABEL_OPTIONAL)
    for name, number, entry in (
        ("request_cost", 4, "RequestCostEntry"),
        ("utilization", 5, "UtilizationEntry"),
        ("named_metrics", 8, "NamedMetricsEntry"),
    ):
        nested = report.nested_type.add(name=entry)
        nested.options.map_entry = True
        nested.field.add(name="key", number=1, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
        nested.field.add(name="value", number=2, type=kinds.TYPE_DOUBLE, label=kinds.LABEL_OPTIONAL)
        type_name = f".xds.data.orca.v3.OrcaLoadReport.{entry}"
        report.field.add(
            name=name, number=number, type=kinds.TYPE_MESSAGE, label=kinds.LABEL_REPEATED, type_name=type_name
        )
    pool.Add(data)

    service = descriptor_pb2.FileDescriptorProto(
        name="orca", package="xds.service.orca.v3", syntax="proto3", dependency=[duration.name]
    )
    asked = service.message_type.add(name="OrcaLoadReportRequest")
    asked.field.add(
        name="report_interval",
        number=1,
        type=kinds.TYPE_MESSAGE,
        label=kinds.LABEL_OPTIONAL,
        type_name=".google.protobuf.Duration",
    )
    asked.field.add(name="request_cost_names", number=2, type=kinds.TYPE_STRING, label=kinds.LABEL_REPEATED)
    pool.Add(service)
    return (
        message_factory.GetMessageClass(pool.FindMessageTypeByName("xds.data.orca.v3.OrcaLoadReport")),
        message_factory.GetMessageClass(pool.FindMessageTypeByName("xds.service.orca.v3.OrcaLoadReportRequest")),
    )


_Report, _Request = _messages()
