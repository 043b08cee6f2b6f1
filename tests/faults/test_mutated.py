"""Requests that are almost right, searched by hypothesis: each is answered or refused with a typed error.

Images, messages, metadata, HTTP/2 and configuration files. The services must not crash, hang or stop serving others.
`make soak` sends 50,000, and with that many memory and time are looked at too: INKWELL_MUTATIONS is how many each test
sends.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import grpc
import psutil
import pytest
import yaml
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import inkwell
from inkwell.common.v1 import common_pb2
from inkwell.diffusion.v1 import diffusion_pb2
from inkwell.ocr.v1 import ocr_pb2
from services import local
from services.gateway import config
from services.gateway.config import ConfigError
from tests.support.mutation import messages, mutated

COUNT = int(os.environ.get("INKWELL_MUTATIONS", "25"))
SEARCH = settings(
    max_examples=COUNT, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True
)
# What a caller may be told about a request that is wrong. Anything else is a defect, or somebody else's call lost.
TOLD = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,  # with a reason: what was asked for takes longer than HANGS_S
}
HANGS_S = 60.0
LONG = 1000  # a run that also measures
GROWTH_BYTES = 128 << 20  # images of many sizes, and queues of their sizes, stay in the allocator's hands
slowest: dict[str, float] = {}  # seconds, by method
IMAGE = sorted(local.SAMPLES.glob("*.png"))[0].read_bytes()
READ = ocr_pb2.RecognizeRequest(image=common_pb2.Image(content=IMAGE))
PAINT = diffusion_pb2.GenerateRequest(prompt="grinning face", step_count=1)
OCR, DIFFUSION = "/inkwell.ocr.v1.OcrService", "/inkwell.diffusion.v1.DiffusionService"
# Method, whether answers are a stream, and an example of its request. Not loading models, which may take its time.
METHODS: dict[str, tuple[bool, Message]] = {
    f"{OCR}/Recognize": (False, READ),
    f"{OCR}/StreamRecognize": (True, ocr_pb2.StreamRecognizeRequest(image=READ.image)),
    f"{OCR}/Embed": (False, ocr_pb2.EmbedRequest()),
    f"{OCR}/UnloadModel": (False, ocr_pb2.UnloadModelRequest(name="nobody")),
    f"{DIFFUSION}/Generate": (True, PAINT),
    f"{DIFFUSION}/ListSchedulers": (False, diffusion_pb2.ListSchedulersRequest()),
}


@pytest.fixture(scope="module")
def channel(fleet: dict[str, local.Service]) -> Iterator[grpc.Channel]:
    """To the gateway; afterwards the same processes still serve, and are no larger than such requests make them."""
    with inkwell.Client(fleet["gateway"].address) as client:
        assert client.read(IMAGE).text
        assert client.paint("grinning face", steps=1)
        before = resident(fleet)
        with grpc.insecure_channel(fleet["gateway"].address, options=[("grpc.enable_retries", 0)]) as opened:
            yield opened
        assert client.read(IMAGE).text
        assert client.paint("grinning face", steps=1)
    after = resident(fleet)
    assert after.keys() == before.keys(), "a process was lost, and another started in its place"
    if COUNT >= LONG:
        print(f"\nslowest: {sorted(((s, path) for path, s in slowest.items()), reverse=True)}")
        print("resident MiB:", {name: (before[name] >> 20, after[name] >> 20) for name in before})
        assert max(slowest.values()) <= 1.0
        assert all(after[name] - before[name] < GROWTH_BYTES for name in before)


def resident(fleet: dict[str, local.Service]) -> dict[str, int]:
    """Bytes of every process of the fleet, by its service and process id."""
    found = {}
    for name, service in fleet.items():
        front = psutil.Process(service.pid)
        for process in (front, *front.children(recursive=True)):
            found[f"{name} {process.pid}"] = process.memory_info().rss
    return found


def send(channel: grpc.Channel, path: str, request: bytes, metadata: tuple[tuple[str, str | bytes], ...] = ()) -> None:
    """Call, and check what the caller is told."""
    began = time.monotonic()
    error = outcome(channel, path, request, metadata)
    slowest[path] = max(slowest.get(path, 0.0), time.monotonic() - began)
    if error is None:
        return
    assert error.code() in TOLD, f"{error.code()}: {error.details()}"
    status = rpc_status.from_call(error)
    assert status is not None, f"not a typed error: {error.details()}"
    assert any(detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR) for detail in status.details)


def outcome(channel: grpc.Channel, path: str, request: bytes, metadata: tuple[tuple[str, str | bytes], ...]) -> Any:
    """The error, None if the call was taken."""
    try:
        if METHODS[path][0]:
            call = channel.unary_stream(path)(request, timeout=HANGS_S, metadata=metadata)
            next(call)  # it was taken; what a hundred steps paint is not asked here
            call.cancel()
        else:
            channel.unary_unary(path)(request, timeout=HANGS_S, metadata=metadata)
    except grpc.RpcError as error:
        return error
    return None


@SEARCH
@given(image=mutated(IMAGE))
def test_images(channel: grpc.Channel, image: bytes) -> None:
    request = ocr_pb2.RecognizeRequest(image=common_pb2.Image(content=image))
    send(channel, f"{OCR}/Recognize", request.SerializeToString())


@pytest.mark.parametrize("path", METHODS)
def test_message_bytes(channel: grpc.Channel, path: str) -> None:
    example = METHODS[path][1]

    @SEARCH
    @given(request=mutated(example.SerializeToString()))
    def search(request: bytes) -> None:
        send(channel, path, request)

    search()


@pytest.mark.parametrize("path", METHODS)
def test_message_fields(channel: grpc.Channel, path: str) -> None:
    example = METHODS[path][1]

    @SEARCH
    @given(request=messages(type(example), like=example))
    def search(request: Message) -> None:
        if isinstance(request, ocr_pb2.UnloadModelRequest) and request.name in ("", "handwriting-tiny"):
            return  # the tests after this one want it
        send(channel, path, request.SerializeToString())

    search()


KEYS = st.one_of(
    st.sampled_from(
        (
            "inkwell-hardware",
            "inkwell-priority",
            "x-request-id",
            "inkwell-pool",
            "user-agent",
            "authorization",
            "trace-bin",
        )
    ),
    st.text("abcdefghijklmnopqrstuvwxyz0123456789-_.", min_size=1, max_size=40).filter(
        lambda key: not key.startswith("grpc-") and not key.endswith("-bin")
    ),
)
VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=100)


@SEARCH
@given(pairs=st.lists(st.tuples(KEYS, VALUES), max_size=12))
def test_metadata(channel: grpc.Channel, pairs: list[tuple[str, str]]) -> None:
    metadata = tuple((key, value.encode() if key.endswith("-bin") else value) for key, value in pairs)
    send(channel, f"{OCR}/UnloadModel", METHODS[f"{OCR}/UnloadModel"][1].SerializeToString(), metadata)


# A unary call to Recognize with an empty message, as HTTP/2 frames: preface, SETTINGS, HEADERS, DATA.
PATH = f"{OCR}/Recognize".encode()
HEADERS = b"".join(
    (
        b"\x83\x86",  # :method POST, :scheme http
        b"\x04" + bytes([len(PATH)]) + PATH,
        b"\x01\x07inkwell",  # :authority
        b"\x00\x0ccontent-type\x10application/grpc",
        b"\x00\x02te\x08trailers",
        b"\x00\x0cgrpc-timeout\x021S",
    )
)
HTTP2 = b"".join(
    (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x00\x00\x00\x04\x00\x00\x00\x00\x00",
        len(HEADERS).to_bytes(3, "big") + b"\x01\x04\x00\x00\x00\x01" + HEADERS,
        b"\x00\x00\x05\x00\x01\x00\x00\x00\x01" + bytes(5),
    )
)


def connected(address: str) -> socket.socket:
    """A connection; raises ConnectionRefusedError if none is taken for long: a server that was broken listens anew."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + HANGS_S
    while True:
        try:
            return socket.create_connection((host, int(port)))
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def hear(address: str, said: bytes) -> bytes:
    """What the server says to these bytes, until it hangs up or has no more to say for a while."""
    heard = b""
    with connected(address) as connection, contextlib.suppress(OSError):
        connection.sendall(said)
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(HANGS_S)
        while piece := connection.recv(65536):
            heard += piece
    return heard


def test_http2_as_it_should_be_is_answered(fleet: dict[str, local.Service]) -> None:
    assert b"grpc-status" in hear(fleet["gateway"].address, HTTP2), "the frames below are not almost right"


@SEARCH
@given(said=mutated(HTTP2))
def test_http2(fleet: dict[str, local.Service], channel: grpc.Channel, said: bytes) -> None:
    hear(fleet["gateway"].address, said)


CONFIG = yaml.safe_dump(
    {
        "pools": [
            {"name": "ocr-cuda", "service": "ocr", "hardware": "cuda", "targets": ["dns:///ocr-cuda:50051"]},
            {"name": "ocr-cpu", "service": "ocr", "hardware": "cpu", "targets": ["10.0.3.7:50051", "[::1]:50051"]},
        ],
        "defaults": {"ocr": ["cuda", "cpu"]},
    }
)


@SEARCH
@given(text=mutated(CONFIG.encode()).map(lambda data: data.decode("utf-8", "surrogateescape")))
def test_configuration_files(text: str) -> None:
    with contextlib.suppress(ConfigError):
        config.parse(text)
