"""A real gRPC server with servicers that do what a test tells them: the subject of these tests is the client.

What is read is decided by the picture's bytes: b"say TEXT" is read as TEXT; b"hold" waits, after a partial text, until
the test releases it or the client goes away; b"bad" is refused as no picture; b"truncated" is cut off; b"blank" holds
no writing. A prompt "hold" waits after its second step. `fail_next` makes the next calls of any kind end in a fault,
before any header. Documents, embeddings and loading are in fake_documents.py, painting is
in fake_painting.py.
"""

import threading
from collections import deque
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
from grpc_status import rpc_status

from inkwell.common.v1 import common_pb2
from inkwell.diffusion.v1 import diffusion_pb2_grpc
from inkwell.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from inkwell.ocr.v1 import ocr_pb2, ocr_pb2_grpc
from services.kit import errors, faults
from tests.unit.inkwell.fake_documents import DocumentServicer, pen
from tests.unit.inkwell.fake_painting import PaintingServicer

TIMEOUT_S = 90.0


class InkwellServer:
    """Listens from the start unless told otherwise; `address` is where."""

    def __init__(self, *, ocr: bool = True, diffusion: bool = True, gateway: bool = True, port: int = 0) -> None:
        self.requests: list[Any] = []
        self.metadata: list[dict[str, str]] = []
        self.time_left_s: list[float | None] = []
        self.fail_next: deque[faults.Fault] = deque()
        self.bare_failure: tuple[grpc.StatusCode, str] | None = None
        self.break_batch_after: int | None = None
        self.end_without_result = False
        self.held = threading.Event()
        """A call waits at a "hold"."""
        self.release = threading.Event()
        """Lets those calls go on."""
        self.cancelled = threading.Event()
        """A call ended before the server was done with it."""
        self.schedulers_known: tuple[str, ...] = ("euler", "ddim")
        self.reader = "pen"
        """The model that ListModels of the OCR service lists."""
        self.painter = "brush"
        """That of the diffusion service."""
        self._server = grpc.server(
            futures.ThreadPoolExecutor(max_workers=16), options=[("grpc.max_receive_message_length", 64 << 20)]
        )
        if ocr:
            ocr_pb2_grpc.add_OcrServiceServicer_to_server(_Ocr(self), self._server)
        if diffusion:
            diffusion_pb2_grpc.add_DiffusionServiceServicer_to_server(PaintingServicer(self), self._server)
        if gateway:
            gateway_pb2_grpc.add_GatewayServiceServicer_to_server(_Gateway(self), self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"
        self._server.start()

    def stop(self) -> None:
        self.release.set()
        self._server.stop(0).wait()

    def admit(self, request: Any, context: Any) -> None:
        """Note the call, refuse it if that was asked for, and send the header as a gateway does."""
        self.requests.append(request)
        self.metadata.append({key: value for key, value in context.invocation_metadata() if isinstance(value, str)})
        self.time_left_s.append(context.time_remaining())
        if self.fail_next:
            refuse(context, self.fail_next.popleft())
        if self.bare_failure is not None:
            context.abort(*self.bare_failure)
        context.send_initial_metadata(
            (("inkwell-pool", "pool-a"), ("inkwell-endpoint", "10.0.0.1:1"), ("inkwell-hardware", "cpu"))
        )

    def refuse(self, context: Any, fault: faults.Fault) -> None:
        """End the call as a service does."""
        refuse(context, fault)

    def hold(self, context: Any) -> None:
        """Wait until released or the client is gone; notes which."""
        gone = threading.Event()

        def leave() -> None:
            gone.set()
            self.release.set()

        if not context.add_callback(leave):
            leave()
        self.held.set()
        assert self.release.wait(TIMEOUT_S)
        if gone.is_set():
            self.cancelled.set()


def refuse(context: Any, fault: faults.Fault) -> None:
    """End the call as a service does."""
    context.abort_with_status(rpc_status.to_status(errors.to_status(fault)))


def recognition(content: bytes) -> ocr_pb2.Recognition:
    """What b"say TEXT" is read as: TEXT, and a less likely alternative in capitals."""
    if content == b"blank":
        return ocr_pb2.Recognition(hypotheses=[ocr_pb2.Hypothesis(confidence=1)], model="pen", confidence=1, blank=True)
    text = content.decode().removeprefix("say ")
    tokens = [ocr_pb2.Token(id=i, text=c, log_probability=-0.25, confidence=0.75) for i, c in enumerate(text[:99])]
    return ocr_pb2.Recognition(
        hypotheses=[
            ocr_pb2.Hypothesis(text=text, log_probability=-0.5, score=-0.125, confidence=0.9, tokens=tokens),
            ocr_pb2.Hypothesis(text=text.upper(), log_probability=-2, score=-0.5, confidence=0.25),
        ],
        truncated=content == b"truncated",
        confidence=0.6,
        confidence_calibrated=True,
        repetition_suspected=content.startswith(b"say again and again"),
        model="pen",
        timing=common_pb2.Timing(queue_ms=1.5, engine_ms=20),
    )


BAD_IMAGE = faults.invalid_field("image.content", "not a picture; PNG, JPEG, WebP, TIFF or BMP", reason="BAD_IMAGE")


class _Ocr(DocumentServicer):
    def __init__(self, server: InkwellServer) -> None:
        self._server = server

    def Recognize(self, request: Any, context: Any) -> Any:
        self._server.admit(request, context)
        content = request.image.content
        if content == b"bad":
            refuse(context, BAD_IMAGE)
        if content == b"hold":
            self._server.hold(context)
        if content == b"nothing":
            return ocr_pb2.RecognizeResponse(recognition=ocr_pb2.Recognition())
        return ocr_pb2.RecognizeResponse(recognition=recognition(content))

    def StreamRecognize(self, request: Any, context: Any) -> Iterator[Any]:
        self._server.admit(request, context)
        content = request.image.content
        answer = ocr_pb2.StreamRecognizeResponse
        if content == b"bad":
            refuse(context, BAD_IMAGE)
        yield answer(sequence=1, queued=common_pb2.Queued(position=2))
        yield answer(sequence=2, started=common_pb2.Started(hardware="cpu", runtime="torch", model="pen"))
        yield answer(sequence=3, partial=ocr_pb2.PartialText(text=content.decode()[:5], token_count=5))
        yield answer(sequence=4)  # an event of a later version
        if content == b"hold":
            self._server.hold(context)
        if not self._server.end_without_result:
            yield answer(sequence=5, result=recognition(content))

    def BatchRecognize(self, request_iterator: Any, context: Any) -> Iterator[Any]:
        self._server.admit(None, context)
        answer = ocr_pb2.BatchRecognizeResponse
        waiting: list[Any] = []
        sequence = 0
        for request in request_iterator:
            self._server.requests.append(request)
            content = request.image.content
            sequence += 1
            if content == b"hold":
                self._server.hold(context)
                return
            if content == b"last":
                waiting.append(request)
            elif content == b"bad":
                yield answer(sequence=sequence, id=request.id, error=errors.to_status(BAD_IMAGE))
            elif content != b"ignored":
                yield answer(sequence=sequence, id=request.id, result=recognition(content))
            if sequence == self._server.break_batch_after:
                refuse(context, faults.unavailable("ENGINE_LOST", "the engine ended", retry_after_ms=500))
        for request in waiting:
            yield answer(sequence=sequence, id=request.id, result=recognition(request.image.content))

    def ListModels(self, request: Any, context: Any) -> Any:
        self._server.admit(request, context)
        return ocr_pb2.ListModelsResponse(models=[pen(self._server.reader)])


class _Gateway(gateway_pb2_grpc.GatewayServiceServicer):
    def __init__(self, server: InkwellServer) -> None:
        self._server = server

    def ListPools(self, request: Any, context: Any) -> Any:
        self._server.admit(request, context)
        ready = gateway_pb2.Endpoint(
            address="10.0.0.1:50051", state=gateway_pb2.ENDPOINT_STATE_READY, in_flight_count=2, call_count=40,
            version="0.1.0",
        )  # fmt: skip
        lost = gateway_pb2.Endpoint(
            address="10.0.0.2:50051", state=gateway_pb2.ENDPOINT_STATE_UNREACHABLE, call_count=7, unavailable_count=3,
            last_error="connection refused",
        )  # fmt: skip
        pools = [
            gateway_pb2.Pool(
                name="ocr-cpu", service="ocr", hardware="cpu", targets=["dns:///ocr:50051"], endpoints=[ready, lost]
            ),
            gateway_pb2.Pool(name="paint-cuda", service="diffusion", hardware="cuda", targets=["dns:///paint:50052"]),
        ]
        wanted = [
            pool for pool in pools if request.service in ("", pool.service) and request.hardware in ("", pool.hardware)
        ]
        return gateway_pb2.ListPoolsResponse(pools=wanted)
