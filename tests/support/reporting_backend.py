"""A backend that says of itself what a test has it say."""

from typing import Any

import grpc

from inkwell.endpoint.v1 import endpoint_pb2
from services.kit.report import Reporter
from tests.support.backend import Backend, Behaviour, echo

_WATCH = "/inkwell.endpoint.v1.EndpointService/WatchReport"


def report(
    label: str = "cpu",
    *,
    device: str = "",
    gib: float = 16,
    capability: str = "",
    runtimes: tuple[str, ...] = ("torch",),
    models: tuple[str, ...] = (),
    loaded: tuple[str, ...] = (),
    store: str = "",
) -> endpoint_pb2.Report:
    """A report of one device; `models` and `loaded` are names."""
    return endpoint_pb2.Report(
        hardware=endpoint_pb2.Hardware(
            label=label, device=device, memory_bytes=int(gib * (1 << 30)), compute_capability=capability
        ),
        runtimes=runtimes,
        models=[
            endpoint_pb2.Model(name=name, loaded=name in loaded, version="v1" if name in loaded else "")
            for name in dict.fromkeys([*models, *loaded])
        ],
        operations_store=store,
    )


class ReportingBackend(Backend):
    """`says` replaces the report at any time."""

    def __init__(self, said: endpoint_pb2.Report, behaviour: Behaviour = echo) -> None:
        super().__init__(behaviour)
        self._reporter = Reporter("ocr")
        self.says(said)

    def says(self, said: endpoint_pb2.Report) -> None:
        self._reporter.set(said)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if handler_call_details.method == _WATCH:
            to_bytes: Any = endpoint_pb2.WatchReportResponse.SerializeToString
            return grpc.unary_stream_rpc_method_handler(
                self._reporter.WatchReport, endpoint_pb2.WatchReportRequest.FromString, to_bytes
            )
        return super().service(handler_call_details)
