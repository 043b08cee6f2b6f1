"""What there is: models, schedulers, pools; and loading models."""

from collections.abc import Iterator
from typing import Literal, get_args

from inkwell import types
from inkwell.common.v1 import common_pb2
from inkwell.converters import shared
from inkwell.converters.read import EARLY_STOPPINGS
from inkwell.diffusion.v1 import diffusion_pb2
from inkwell.errors import invalid
from inkwell.gateway.v1 import gateway_pb2
from inkwell.ocr.v1 import ocr_pb2

Service = Literal["ocr", "diffusion"]

_ENDPOINT_STATES = shared.by_number(gateway_pb2.EndpointState, "ENDPOINT_STATE_", types.EndpointState)
_MODEL_STATES = shared.by_number(common_pb2.ModelState, "MODEL_STATE_", types.ModelState)
_LOAD_STAGES = shared.by_number(ocr_pb2.LoadStage, "LOAD_STAGE_", types.LoadStage)
_ADAPTER_KINDS = shared.by_number(diffusion_pb2.AdapterKind, "ADAPTER_KIND_", types.AdapterKind)
_CONTROL_KINDS = shared.by_number(diffusion_pb2.ControlKind, "CONTROL_KIND_", types.ControlKind)
_PRECISIONS = shared.by_number(ocr_pb2.Precision, "PRECISION_", types.Precision)
_PRECISION_NUMBERS = shared.by_name(_PRECISIONS)


def ocr_models(message: ocr_pb2.ListModelsResponse) -> Iterator[types.OcrModel]:
    """In the server's order."""
    return map(ocr_model, message.models)


def ocr_model(message: ocr_pb2.Model) -> types.OcrModel:
    """One model that reads."""
    decoding = shared.same_named(message.default_decoding, types.Decoding)
    decoding["early_stopping"] = EARLY_STOPPINGS.get(message.default_decoding.early_stopping)
    values = shared.same_named(message, types.OcrModel)
    values["state"] = _MODEL_STATES.get(message.state, types.ModelState.UNKNOWN)
    values["default_decoding"] = types.Decoding(**decoding)
    values["precision"] = _PRECISIONS.get(message.precision)
    return types.OcrModel(**values)


def diffusion_models(message: diffusion_pb2.ListModelsResponse) -> Iterator[types.DiffusionModel]:
    """In the server's order."""
    return map(diffusion_model, message.models)


def diffusion_model(message: diffusion_pb2.Model) -> types.DiffusionModel:
    """One model that paints."""
    values = shared.same_named(message, types.DiffusionModel)
    values["state"] = _MODEL_STATES.get(message.state, types.ModelState.UNKNOWN)
    return types.DiffusionModel(**values)


def load_request(
    name: str, service: Service, *, precision: str | None = None, artifact: str = "", runtime: str = ""
) -> ocr_pb2.LoadModelRequest | diffusion_pb2.LoadModelRequest:
    """Raises InvalidRequest for a precision that there is not, and for what the service does not take."""
    _check(service)
    if service == "diffusion":
        painter = diffusion_pb2.LoadModelRequest()
        shared.assign(painter, "name", name)
        for field, value in (("precision", precision), ("artifact", artifact), ("runtime", runtime)):
            if value and field not in painter.DESCRIPTOR.fields_by_name:
                raise invalid(field, "the models of the diffusion service have only that of its settings")
            if value:
                shared.assign(painter, field, value)
        return painter
    request = ocr_pb2.LoadModelRequest()
    shared.assign(request, "name", name)
    shared.assign(request, "precision", shared.choice("precision", precision, _PRECISION_NUMBERS))
    shared.assign(request, "artifact", artifact)
    shared.assign(request, "runtime", runtime)
    return request


def unload_request(name: str, service: Service) -> ocr_pb2.UnloadModelRequest | diffusion_pb2.UnloadModelRequest:
    """Whether there is such a model the server knows."""
    _check(service)
    request = diffusion_pb2.UnloadModelRequest() if service == "diffusion" else ocr_pb2.UnloadModelRequest()
    shared.assign(request, "name", name)
    return request


def load_event(
    message: ocr_pb2.LoadModelResponse | diffusion_pb2.LoadModelResponse, served: types.ServedBy
) -> types.LoadEvent | None:
    """None for an event that this version does not know."""
    match message.WhichOneof("event"):
        case "progress":
            # The stages have the same numbers in both services.
            stage = _LOAD_STAGES.get(message.progress.stage, types.LoadStage.UNKNOWN)
            return types.LoadProgress(message.sequence, stage, tuple(message.progress.evicted_models))
        case "result":
            result = message.result
            elapsed_ms = result.elapsed_ms if isinstance(result, ocr_pb2.LoadResult) else 0
            return types.LoadResult(message.sequence, model(result.model), elapsed_ms)
    return None


def model(message: ocr_pb2.Model | diffusion_pb2.Model) -> types.Model:
    """A model of either kind."""
    return ocr_model(message) if isinstance(message, ocr_pb2.Model) else diffusion_model(message)


def schedulers(message: diffusion_pb2.ListSchedulersResponse) -> list[types.Scheduler]:
    """In the server's order."""
    return [types.Scheduler(**shared.same_named(each, types.Scheduler)) for each in message.schedulers]


def adapters(message: diffusion_pb2.ListAdaptersResponse) -> list[types.Adapter]:
    """In the server's order."""
    return [_adapter(each) for each in message.adapters]


def controls(message: diffusion_pb2.ListControlsResponse) -> types.Controls:
    """In the server's order."""
    steps = tuple(types.Preprocessor(**shared.same_named(each, types.Preprocessor)) for each in message.preprocessors)
    return types.Controls(tuple(_control_model(each) for each in message.models), steps)


def list_pools_request(service: str, hardware: str) -> gateway_pb2.ListPoolsRequest:
    """Empty strings for all."""
    request = gateway_pb2.ListPoolsRequest()
    shared.assign(request, "service", service)
    shared.assign(request, "hardware", hardware)
    return request


def pools(message: gateway_pb2.ListPoolsResponse) -> list[types.Pool]:
    """In the gateway's order."""
    return [
        types.Pool(
            name=pool.name,
            service=pool.service,
            hardware=pool.hardware,
            targets=tuple(pool.targets),
            endpoints=tuple(_endpoint(each) for each in pool.endpoints),
        )
        for pool in message.pools
    ]


def _adapter(message: diffusion_pb2.Adapter) -> types.Adapter:
    values = shared.same_named(message, types.Adapter)
    values["kind"] = _ADAPTER_KINDS.get(message.kind, types.AdapterKind.UNKNOWN)
    return types.Adapter(**values)


def _control_model(message: diffusion_pb2.ControlModel) -> types.ControlModel:
    values = shared.same_named(message, types.ControlModel)
    values["kind"] = _CONTROL_KINDS.get(message.kind, types.ControlKind.UNKNOWN)
    return types.ControlModel(**values)


def _check(service: str) -> None:
    if service not in get_args(Service):
        raise invalid("service", f"{service!r} is none of {', '.join(get_args(Service))}")


def _endpoint(message: gateway_pb2.Endpoint) -> types.Endpoint:
    values = shared.same_named(message, types.Endpoint)
    values["state"] = _ENDPOINT_STATES.get(message.state, types.EndpointState.UNKNOWN)
    return types.Endpoint(**values)
