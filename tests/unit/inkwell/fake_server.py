"""A real gRPC server with servicers that do what a test tells them: the subject of these tests is the client.

What is read is decided by the picture's bytes: b"say TEXT" is read as TEXT; b"hold" waits, after a partial text, until
the test releases it or the client goes away; b"bad" is refused as no picture; b"truncated" is cut off; b"blank" holds
no writing. A prompt "hold" waits after its second step. `fail_next` makes the next calls of any kind end in a fault,
before any header. Documents, embeddings and loading are in fake_documents.py.
"""

import io
import threading
from collections import deque
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
from grpc_status import rpc_status
from PIL import Image, PngImagePlugin

from inkwell.common.v1 import common_pb2
from inkwell.diffusion.v1 import diffusion_pb2, diffusion_pb2_grpc
from inkwell.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from inkwell.ocr.v1 import ocr_pb2, ocr_pb2_grpc
from services.kit import errors, faults
from tests.unit.inkwell.fake_documents import DocumentServicer, pen

TIMEOUT_S = 30.0


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
        self.schedulers_known = ("euler", "ddim")
        self._server = grpc.server(
            futures.ThreadPoolExecutor(max_workers=16), options=[("grpc.max_receive_message_length", 64 << 20)]
        )
        if ocr:
            ocr_pb2_grpc.add_OcrServiceServicer_to_server(_Ocr(self), self._server)
        if diffusion:
            diffusion_pb2_grpc.add_DiffusionServiceServicer_to_server(_Diffusion(self), self._server)
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
        return ocr_pb2.ListModelsResponse(models=[pen()])


class _Diffusion(diffusion_pb2_grpc.DiffusionServiceServicer):
    def __init__(self, server: InkwellServer) -> None:
        self._server = server

    def Generate(self, request: Any, context: Any) -> Iterator[Any]:
        self._server.admit(request, context)
        answer = diffusion_pb2.GenerateResponse
        if request.scheduler and request.scheduler not in self._server.schedulers_known:
            refuse(
                context,
                faults.not_found("scheduler", request.scheduler, self._server.schedulers_known, field="scheduler"),
            )
        if request.HasField("step_count") and not 1 <= request.step_count <= 1000:
            refuse(context, faults.invalid_field("step_count", f"{request.step_count} is not within 1 to 1000"))
        count = request.image_count or 1
        steps = request.step_count or 20
        pictures = [picture(request, number) for number in range(count)]
        sequence = iter(range(1, 10_000))
        yield answer(sequence=next(sequence), queued=common_pb2.Queued(position=3))
        yield answer(
            sequence=next(sequence), started=common_pb2.Started(hardware="cpu", runtime="torch", model="brush")
        )
        for step in range(1, steps + 1):
            if request.prompt == "hold" and step == 3:
                self._server.hold(context)
            progress = common_pb2.Progress(step=step, step_count=steps, eta_ms=100 * (steps - step))
            yield answer(sequence=next(sequence), progress=progress)
            if not request.preview.disabled:
                images = [
                    common_pb2.Image(content=encoded(each.parameters, "image/jpeg"), media_type="image/jpeg")
                    for each in pictures
                ]
                yield answer(sequence=next(sequence), preview=diffusion_pb2.Preview(step=step, images=images))
        if not self._server.end_without_result:
            warnings = ["the prompt was cut off after 77 tokens"] if len(request.prompt) > 300 else []
            result = diffusion_pb2.GenerateResult(
                images=pictures, timing=common_pb2.Timing(queue_ms=0.5, engine_ms=2000), warnings=warnings
            )
            yield answer(sequence=next(sequence), result=result)

    def ListModels(self, request: Any, context: Any) -> Any:
        self._server.admit(request, context)
        model = diffusion_pb2.Model(
            name="brush", state=common_pb2.MODEL_STATE_LOADING, hardware="cpu", runtime="torch", dtype="bfloat16",
            parameter_count=9_000_000, pipeline="StableDiffusionPipeline", default_width=64, default_height=64,
            size_multiple=8, default_step_count=20, default_guidance_scale=2.5, default_scheduler="euler",
            prompt_token_limit=77, has_preview_autoencoder=True, is_default=True,
        )  # fmt: skip
        return diffusion_pb2.ListModelsResponse(models=[model])

    def ListSchedulers(self, request: Any, context: Any) -> Any:
        self._server.admit(request, context)
        return diffusion_pb2.ListSchedulersResponse(
            schedulers=[
                diffusion_pb2.Scheduler(name=name, diffusers_class=name.upper(), description=f"Take {name}.")
                for name in self._server.schedulers_known
            ]
        )


def picture(request: Any, number: int) -> diffusion_pb2.GeneratedImage:
    """A picture of one colour, decided by its parameters, which are embedded as the service does it."""
    parameters = diffusion_pb2.GenerationParameters(
        model=request.model or "brush",
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=request.width or 16,
        height=request.height or 8,
        step_count=request.step_count or 20,
        guidance_scale=request.guidance_scale if request.HasField("guidance_scale") else 2.5,
        scheduler=request.scheduler or "euler",
        seed=(request.seed if request.HasField("seed") else 1000) + number,
    )
    media_type = request.output.media_type or "image/png"
    image = common_pb2.Image(content=encoded(parameters, media_type), media_type=media_type)
    return diffusion_pb2.GeneratedImage(image=image, parameters=parameters)


def encoded(parameters: diffusion_pb2.GenerationParameters, media_type: str) -> bytes:
    import json

    values = {field.name: getattr(parameters, field.name) for field in parameters.DESCRIPTOR.fields}
    seed = parameters.seed
    image = Image.new("RGB", (parameters.width, parameters.height), (seed % 256, seed // 7 % 256, 128))
    buffer = io.BytesIO()
    if media_type == "image/png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("inkwell", json.dumps(values))
        image.save(buffer, "PNG", pnginfo=info)
    else:
        exif = Image.Exif()
        exif[0x010E] = json.dumps(values)
        image.save(buffer, media_type.removeprefix("image/").upper(), exif=exif)
    return buffer.getvalue()


class _Gateway(gateway_pb2_grpc.GatewayServiceServicer):
    def __init__(self, server: InkwellServer) -> None:
        self._server = server

    def ListPools(self, request: Any, context: Any) -> Any:
        self._server.admit(request, context)
        ready = gateway_pb2.Endpoint(
            address="10.0.0.1:50051", state=gateway_pb2.ENDPOINT_STATE_READY, in_flight_count=2, call_count=40
        )
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
