"""What the gateway reads of a request: the same as protobuf does, of whatever bytes, and nothing more."""

from typing import Any

import pytest
from google.longrunning import operations_pb2
from hypothesis import given
from hypothesis import strategies as st

from inkwell.common.v1 import common_pb2
from inkwell.compiler.v1 import compiler_pb2
from inkwell.diffusion.v1 import diffusion_pb2
from inkwell.ocr.v1 import ocr_pb2
from services.gateway import asked
from services.gateway.methods import METHODS
from services.kit.faults import Fault

OCR, DIFFUSION = "/inkwell.ocr.v1.OcrService/", "/inkwell.diffusion.v1.DiffusionService/"
COMPILE = METHODS["/inkwell.compiler.v1.CompilerService/Compile"]
ID = "8f14e45f-ceea-467f-a1d6-0123456789ab"


@pytest.mark.parametrize(
    ("path", "request_message"),
    [
        (OCR + "Recognize", ocr_pb2.RecognizeRequest(image=common_pb2.Image(content=b"\x12\x01x" * 999), model="m-1")),
        (OCR + "StreamRecognize", ocr_pb2.StreamRecognizeRequest(model="m-1")),
        (OCR + "ReadDocument", ocr_pb2.ReadDocumentRequest(model="m-1")),
        (OCR + "BatchRecognize", ocr_pb2.BatchRecognizeRequest(id="x", model="m-1")),
        (OCR + "LoadModel", ocr_pb2.LoadModelRequest(name="m-1")),
        (OCR + "UnloadModel", ocr_pb2.UnloadModelRequest(name="m-1")),
        (DIFFUSION + "Generate", diffusion_pb2.GenerateRequest(model="m-1", prompt="x")),
        (DIFFUSION + "LoadModel", diffusion_pb2.LoadModelRequest(name="m-1")),
        (COMPILE.path, compiler_pb2.CompileRequest(model="m-1", target=compiler_pb2.TARGET_ONNX)),
    ],
)
def test_the_model_is_read_from_every_request_that_names_one(path: str, request_message: Any) -> None:
    read = asked.read(METHODS[path], request_message.SerializeToString())
    assert (read.model, read.tensorrt, read.operation) == ("m-1", False, "")


def test_a_compile_says_its_target_and_the_operation_it_would_begin() -> None:
    request = compiler_pb2.CompileRequest(model="m", target=compiler_pb2.TARGET_TENSORRT, request_id=ID.upper())
    read = asked.read(COMPILE, request.SerializeToString())
    assert (read.model, read.tensorrt, read.begins) == ("m", True, True)
    assert read.operation == f"operations/compiler/{ID}"
    # What is no UUID the service refuses; it may not become part of a name that others are asked for.
    request.request_id = "../../x"
    assert asked.read(COMPILE, request.SerializeToString()).operation == ""


def test_calls_about_an_operation_name_it_and_lists_do_not() -> None:
    get, listing = (METHODS[f"/google.longrunning.Operations/{name}"] for name in ("GetOperation", "ListOperations"))
    name = f"operations/compiler/{ID}"
    read = asked.read(get, operations_pb2.GetOperationRequest(name=name).SerializeToString())
    assert (read.operation, read.begins, read.method.service) == (name, False, "compiler")
    whole = operations_pb2.ListOperationsRequest(name="operations/compiler").SerializeToString()
    assert asked.read(listing, whole).operation == ""
    with pytest.raises(Fault, match="names no service"):
        asked.read(get, operations_pb2.GetOperationRequest(name="elsewhere/1").SerializeToString())


def test_the_name_of_a_begun_operation_is_read_from_the_answer() -> None:
    answer = operations_pb2.Operation(name=f"operations/compiler/{ID}", done=True)
    assert asked.begun(answer.SerializeToString()) == f"operations/compiler/{ID}"


@given(st.binary(max_size=300))
def test_any_bytes_are_read_without_a_fault(data: bytes) -> None:
    for method in METHODS.values():
        if method.service:
            assert len(asked.read(method, data).model) <= 256


@given(
    model=st.text(max_size=80),
    content=st.binary(max_size=200),
    hints=st.lists(st.text(max_size=5), max_size=3),
    width=st.integers(0, 2**31 - 1),
)
def test_what_is_read_is_what_protobuf_reads(model: str, content: bytes, hints: list[str], width: int) -> None:
    request = ocr_pb2.RecognizeRequest(image=common_pb2.Image(content=content), model=model, language_hints=hints)
    request.decoding.beam_width = width
    data = request.SerializeToString() + ocr_pb2.RecognizeRequest(model="last").SerializeToString()
    assert asked.read(METHODS[OCR + "Recognize"], data).model == "last"
    read = asked.read(METHODS[OCR + "Recognize"], request.SerializeToString()).model
    assert read == (model if len(model.encode()) <= 256 else "")


async def test_a_stream_is_whole_after_its_first_request_was_read() -> None:
    async def requests() -> Any:
        for number in range(3):
            yield ocr_pb2.BatchRecognizeRequest(id=str(number), model="m").SerializeToString()

    method = METHODS[OCR + "BatchRecognize"]
    read, whole = await asked.read_first(method, requests())
    assert read.model == "m"
    assert [ocr_pb2.BatchRecognizeRequest.FromString(r).id async for r in whole] == ["0", "1", "2"]

    async def nothing() -> Any:
        for _ in ():
            yield b""

    read, whole = await asked.read_first(method, nothing())
    assert read.model == ""
    assert [r async for r in whole] == []
