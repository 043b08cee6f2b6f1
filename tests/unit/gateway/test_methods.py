"""Which paths are routed, and as what."""

from typing import Any

import pytest
from google.longrunning import operations_pb2

from inkwell.operations.v1 import operations_pb2 as watch_pb2
from services.gateway import methods
from services.kit.faults import Fault, Kind


@pytest.mark.parametrize(
    ("path", "service", "streams"),
    [
        ("/inkwell.ocr.v1.OcrService/Recognize", "ocr", (False, False)),
        ("/inkwell.ocr.v1.OcrService/StreamRecognize", "ocr", (False, True)),
        ("/inkwell.ocr.v1.OcrService/BatchRecognize", "ocr", (True, True)),
        ("/inkwell.ocr.v1.OcrService/ReadDocument", "ocr", (False, True)),
        ("/inkwell.ocr.v1.OcrService/Embed", "ocr", (False, False)),
        ("/inkwell.ocr.v1.OcrService/LoadModel", "ocr", (False, True)),
        ("/inkwell.ocr.v1.OcrService/UnloadModel", "ocr", (False, False)),
        ("/inkwell.diffusion.v1.DiffusionService/Generate", "diffusion", (False, True)),
        ("/inkwell.diffusion.v1.DiffusionService/ListSchedulers", "diffusion", (False, False)),
        ("/inkwell.ocr.v1.OcrService/OfTomorrow", "ocr", (True, True)),
    ],
)
def test_routed(path: str, service: str, streams: tuple[bool, bool]) -> None:
    method = methods.find(path)
    assert method is not None
    assert (method.path, method.service) == (path, service)
    assert (method.request_streaming, method.response_streaming) == streams


@pytest.mark.parametrize(
    "path", ["/inkwell.ocr.v2.OcrService/Recognize", "/OcrService/Recognize", "/inkwell.ocr.v1.OcrService/", "", "/"]
)
def test_not_routed(path: str) -> None:
    assert methods.find(path) is None


def test_metric_labels_do_not_grow_with_what_callers_make_up() -> None:
    made_up = {found.label for i in range(50) if (found := methods.find(f"/inkwell.ocr.v1.OcrService/M{i}"))}
    assert made_up == {"inkwell.ocr.v1.OcrService/other"}


@pytest.mark.parametrize(
    ("path", "request_", "streams"),
    [
        ("/google.longrunning.Operations/GetOperation", operations_pb2.GetOperationRequest, False),
        ("/google.longrunning.Operations/ListOperations", operations_pb2.ListOperationsRequest, False),
        ("/google.longrunning.Operations/CancelOperation", operations_pb2.CancelOperationRequest, False),
        ("/google.longrunning.Operations/DeleteOperation", operations_pb2.DeleteOperationRequest, False),
        ("/google.longrunning.Operations/WaitOperation", operations_pb2.WaitOperationRequest, False),
        ("/inkwell.operations.v1.OperationsWatchService/Watch", watch_pb2.WatchRequest, True),
    ],
)
def test_a_call_about_an_operation_goes_to_the_service_in_its_name(path: str, request_: Any, streams: bool) -> None:
    method = methods.find(path)
    assert method is not None
    assert method.response_streaming == streams
    for name in ("operations/compiler/0b5d7a3e-6f39-4b0e-9c57-3f1c1a6f0a11", "operations/compiler"):
        assert methods.addressed(method, request_(name=name).SerializeToString()).service == "compiler"


@pytest.mark.parametrize("name", ["", "operations", "operations/", "operations/painter/1", "compiler/1", "x" * 500])
def test_an_operation_of_no_service_is_refused_by_name(name: str) -> None:
    method = methods.find("/google.longrunning.Operations/GetOperation")
    assert method is not None
    with pytest.raises(Fault, match=r"name: .*accepted: operations/SERVICE/ID") as failure:
        methods.addressed(method, operations_pb2.GetOperationRequest(name=name).SerializeToString())
    assert failure.value.data.kind is Kind.INVALID_ARGUMENT


def test_a_request_that_is_no_message_is_refused() -> None:
    method = methods.find("/google.longrunning.Operations/GetOperation")
    assert method is not None
    with pytest.raises(Fault, match="cannot be read"):
        methods.addressed(method, b"\xff\xff\xff")


def test_other_calls_are_not_read() -> None:
    method = methods.find("/inkwell.ocr.v1.OcrService/Recognize")
    assert method is not None
    assert methods.addressed(method, b"\xff\xff\xff") is method
