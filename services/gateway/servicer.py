"""GatewayService: what this gateway knows of its fleet."""

import grpc

from inkwell.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from services.gateway.endpoint import Endpoint, State
from services.gateway.methods import FULL_NAMES
from services.gateway.pools import Fleet, Pool
from services.gateway.preference import LABELS
from services.gateway.reload import Reloading
from services.gateway.selectors import Report
from services.kit import faults

_STATES = {
    State.CONNECTING: gateway_pb2.ENDPOINT_STATE_CONNECTING,
    State.READY: gateway_pb2.ENDPOINT_STATE_READY,
    State.NOT_READY: gateway_pb2.ENDPOINT_STATE_NOT_READY,
    State.UNREACHABLE: gateway_pb2.ENDPOINT_STATE_UNREACHABLE,
    State.NOT_SELECTED: gateway_pb2.ENDPOINT_STATE_NOT_SELECTED,
}


class GatewayServicer(gateway_pb2_grpc.GatewayServiceServicer):
    """Answers from memory; nothing is asked of the endpoints."""

    def __init__(self, fleet: Fleet, reloading: Reloading | None = None) -> None:
        self._fleet = fleet
        self._reloading = reloading

    async def ListPools(  # noqa: N802 - the name is the protocol's
        self, request: gateway_pb2.ListPoolsRequest, context: grpc.aio.ServicerContext
    ) -> gateway_pb2.ListPoolsResponse:
        if request.service and request.service not in FULL_NAMES:
            raise faults.invalid_field(
                "service", f"{request.service[:40]!r} is not a service; accepted: {', '.join(FULL_NAMES)}, or empty"
            )
        if request.hardware and request.hardware not in LABELS:
            raise faults.invalid_field(
                "hardware",
                f"{request.hardware[:40]!r} is not a hardware label; accepted: {', '.join(LABELS)}, or empty",
            )
        return gateway_pb2.ListPoolsResponse(
            pools=[
                _pool(pool)
                for pool in self._fleet.pools
                if request.service in ("", pool.service) and request.hardware in ("", pool.hardware)
            ],
            configuration=_configuration(self._reloading),
        )


def _configuration(reloading: Reloading | None) -> gateway_pb2.Configuration | None:
    if reloading is None:
        return None
    return gateway_pb2.Configuration(
        file=str(reloading.file), digest=reloading.digest, loaded_at=reloading.loaded_at, error=reloading.error
    )


def _pool(pool: Pool) -> gateway_pb2.Pool:
    return gateway_pb2.Pool(
        name=pool.name,
        service=pool.service,
        hardware=pool.hardware,
        targets=[target.text for target in pool.targets],
        endpoints=[_endpoint(endpoint) for endpoint in pool.endpoints],
    )


def _endpoint(endpoint: Endpoint) -> gateway_pb2.Endpoint:
    report = endpoint.report or Report()
    return gateway_pb2.Endpoint(
        address=endpoint.address,
        state=_STATES[endpoint.state],
        in_flight_count=endpoint.in_flight,
        call_count=endpoint.calls,
        unavailable_count=endpoint.unavailable,
        last_error=endpoint.last_error,
        device=report.hardware.device,
        memory_bytes=report.hardware.memory_bytes,
        compute_capability=report.hardware.compute_capability,
        runtimes=report.runtimes,
        loaded_models=[f"{model.name}@{model.version}" for model in report.models if model.loaded],
        version=report.version,
    )
