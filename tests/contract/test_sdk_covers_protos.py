"""The SDK says everything that the protos say: a field or a call added there is missed here until the SDK has it."""

import dataclasses
from typing import Any

import pytest

import inkwell
from inkwell.common.v1 import common_pb2
from inkwell.converters import PaintOptions, ReadOptions
from inkwell.diffusion.v1 import diffusion_pb2
from inkwell.gateway.v1 import gateway_pb2
from inkwell.ocr.v1 import ocr_pb2

# Message → dataclass with the same fields.
SAME: list[tuple[Any, type]] = [
    (ocr_pb2.Token, inkwell.Token),
    (ocr_pb2.Hypothesis, inkwell.Hypothesis),
    (ocr_pb2.Model, inkwell.OcrModel),
    (ocr_pb2.DecodingOptions, inkwell.Decoding),
    (diffusion_pb2.GenerationParameters, inkwell.GenerationParameters),
    (diffusion_pb2.Model, inkwell.DiffusionModel),
    (diffusion_pb2.Scheduler, inkwell.Scheduler),
    (gateway_pb2.Pool, inkwell.Pool),
    (gateway_pb2.Endpoint, inkwell.Endpoint),
    (common_pb2.Timing, inkwell.Timing),
    (common_pb2.Image, inkwell.Image),
]

# Message → dataclass with the same fields and these more.
MORE: list[tuple[Any, type, set[str]]] = [
    (ocr_pb2.Recognition, inkwell.Reading, {"served_by"}),
    (ocr_pb2.PartialText, inkwell.Partial, {"sequence"}),
    (common_pb2.Queued, inkwell.Queued, {"sequence"}),
    (common_pb2.Started, inkwell.Started, {"sequence"}),
    (common_pb2.Progress, inkwell.Progress, {"sequence"}),
    (diffusion_pb2.Preview, inkwell.Preview, {"sequence"}),
]


def fields_of(message: Any) -> set[str]:
    return {field.name for field in message.DESCRIPTOR.fields}


def names_of(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize(("message", "kind"), SAME, ids=lambda value: value.__name__)
def test_results_have_the_fields_of_their_message(message: Any, kind: type) -> None:
    assert names_of(kind) == fields_of(message)


@pytest.mark.parametrize(("message", "kind", "more"), MORE, ids=lambda value: getattr(value, "__name__", ""))
def test_results_have_at_least_the_fields_of_their_message(message: Any, kind: type, more: set[str]) -> None:
    assert names_of(kind) == fields_of(message) | more


def test_every_event_has_its_dataclass() -> None:
    def events(message: Any) -> set[str]:
        return {field.name for field in message.DESCRIPTOR.oneofs_by_name["event"].fields}

    assert events(ocr_pb2.StreamRecognizeResponse) == {"queued", "started", "partial", "result"}
    assert events(diffusion_pb2.GenerateResponse) == {"queued", "started", "progress", "preview", "result"}


def test_every_request_field_can_be_given() -> None:
    assert names_of(ReadOptions) == {"model"} | fields_of(ocr_pb2.DecodingOptions)
    for request in (ocr_pb2.RecognizeRequest, ocr_pb2.StreamRecognizeRequest, ocr_pb2.BatchRecognizeRequest):
        assert fields_of(request) - {"id"} == {"image", "model", "decoding"}
    renamed = {"step_count": "steps"}
    plain = {renamed.get(name, name) for name in fields_of(diffusion_pb2.GenerateRequest)} - {"output", "preview"}
    assert names_of(PaintOptions) == plain | fields_of(diffusion_pb2.OutputOptions) | {"previews"}


def test_every_call_has_a_method() -> None:
    calls = {
        f"{service.name}.{method.name}"
        for module in (ocr_pb2, diffusion_pb2, gateway_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert calls == {
        "OcrService.Recognize",  # read
        "OcrService.StreamRecognize",  # read_stream
        "OcrService.BatchRecognize",  # read_many
        "OcrService.ListModels",  # models
        "DiffusionService.Generate",  # paint, paint_stream
        "DiffusionService.ListModels",  # models
        "DiffusionService.ListSchedulers",  # schedulers
        "GatewayService.ListPools",  # fleet
    }


@pytest.mark.parametrize(
    ("enum", "kind"),
    [(common_pb2.ModelState, inkwell.ModelState), (gateway_pb2.EndpointState, inkwell.EndpointState)],
    ids=["ModelState", "EndpointState"],
)
def test_every_state_has_its_name(enum: Any, kind: Any) -> None:
    prefix = {inkwell.ModelState: "MODEL_STATE_", inkwell.EndpointState: "ENDPOINT_STATE_"}[kind]
    names = {name.removeprefix(prefix).replace("UNSPECIFIED", "UNKNOWN") for name in enum.keys()}  # noqa: SIM118
    assert names == set(kind.__members__)
