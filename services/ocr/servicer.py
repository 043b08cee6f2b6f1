"""The gRPC surface of the OCR service: validate, admit, decode the image, submit, stream back."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
import msgspec
import structlog
from prometheus_client import Counter, Histogram

from inkwell.common.v1 import common_pb2
from inkwell.endpoint.v1 import endpoint_pb2
from inkwell.ocr.v1 import ocr_pb2, ocr_pb2_grpc
from services.kit import engine_metrics, errors, faults
from services.kit.admission import Priority
from services.kit.call import label_call, priority_of, send_header, time_left
from services.kit.engine_api import Accepted, Finished, Update
from services.kit.engine_host import EngineHost, engine_not_ready
from services.kit.faults import Fault
from services.kit.images import Limits, check_size
from services.kit.job import HostEvent, Job, Queued
from services.kit.metrics import FIRST_PROGRESS_BUCKETS, Metrics
from services.ocr import converters, images, model_converters
from services.ocr.documents.service import Caller as DocumentCaller
from services.ocr.documents.service import Documents
from services.ocr.domain import Embedding, Line, ModelInfo, Partial, ReadJob, Recognition
from services.ocr.models import Models
from services.ocr.settings import Settings

log = structlog.get_logger(__name__)

_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)

# The requests that a model answers.
ModelRequest = converters.ReadRequest | ocr_pb2.ReadDocumentRequest | ocr_pb2.EmbedRequest


class OcrMetrics:
    """What this service counts besides the kit's metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self.tokens = Counter(
            "inkwell_decode_tokens", "Tokens decoded, over all beams.", ["model"], registry=metrics.registry
        )
        self.batch_size = Histogram(
            "inkwell_batch_size",
            "Decoder rows that shared a call's steps, on average over the call.",
            ["model"],
            buckets=_BATCH_BUCKETS,
            registry=metrics.registry,
        )
        self.first_progress_seconds = Histogram(
            "inkwell_first_progress_seconds",
            "Time from a streamed call's arrival to its first text.",
            buckets=FIRST_PROGRESS_BUCKETS,
            registry=metrics.registry,
        )


@dataclass(frozen=True)
class _Caller:
    """What a call's metadata and deadline say."""

    priority: Priority
    context: grpc.aio.ServicerContext


class OcrServicer(ocr_pb2_grpc.OcrServiceServicer):
    """Implements inkwell.ocr.v1.OcrService on an engine host. `close` it after the server has ended its last call."""

    def __init__(self, host: EngineHost, settings: Settings, metrics: Metrics) -> None:
        self._host = host
        self._settings = settings
        self._models = Models(host, settings)
        self._metrics = OcrMetrics(metrics)
        engine_metrics.register(metrics, host, lambda: [(m, m.weight_bytes) for m in self._models.engine_info().models])
        self._limits = Limits(settings.max_image_bytes, settings.max_image_pixels, settings.min_image_side)
        # Bounded, so that a flood of large images cannot take every core from the engine.
        self._decoders = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="image")
        self._documents = Documents(host, settings, metrics, executor=self._decoders, count_reading=self._count_reading)

    def close(self) -> None:
        """Let go of the decoding threads."""
        self._decoders.shutdown(wait=False, cancel_futures=True)

    async def report(self) -> endpoint_pb2.Report:
        """What the service says of itself to whoever routes to it."""
        return model_converters.to_report(self._models.device(), await self._models.listed())

    async def Recognize(
        self, request: ocr_pb2.RecognizeRequest, context: grpc.aio.ServicerContext
    ) -> ocr_pb2.RecognizeResponse:
        caller = _Caller(priority_of(context), context)
        return ocr_pb2.RecognizeResponse(recognition=await self._read_once(request, caller))

    async def StreamRecognize(
        self, request: ocr_pb2.StreamRecognizeRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[ocr_pb2.StreamRecognizeResponse]:
        arrived: float | None = time.monotonic()
        caller = _Caller(priority_of(context), context)
        sequence = 0
        async with self._admitted(request, caller, partials=True) as (model, job):
            # Only now: a refusal that comes without headers may be retried by the client's own policy.
            await send_header(context)
            async for event in job:
                response = self._stream_response(event, model, job)
                if arrived is not None and response.WhichOneof("event") in ("partial", "result"):
                    self._metrics.first_progress_seconds.observe(time.monotonic() - arrived)
                    arrived = None
                sequence += 1
                response.sequence = sequence
                yield response

    async def BatchRecognize(
        self, requests: AsyncIterator[ocr_pb2.BatchRecognizeRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[ocr_pb2.BatchRecognizeResponse]:
        caller = _Caller(priority_of(context), context)
        if not self._host.ready:
            raise engine_not_ready()  # the whole stream, so that it can be sent elsewhere
        await send_header(context)
        answers: asyncio.Queue[ocr_pb2.BatchRecognizeResponse | None] = asyncio.Queue()
        # The next item is taken off the stream only when one before it was answered and the answer taken, so that
        # HTTP/2 flow control reaches a client that sends faster than lines are read, or does not listen.
        places = asyncio.Semaphore(self._settings.batch_in_flight)
        feeding = asyncio.create_task(self._feed(requests, caller, places, answers))
        sequence = 0
        try:
            while (answer := await answers.get()) is not None:
                sequence += 1
                answer.sequence = sequence
                yield answer
                places.release()
            await feeding  # raises what went wrong with the stream itself
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)

    async def ReadDocument(
        self, request: ocr_pb2.ReadDocumentRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[ocr_pb2.ReadDocumentResponse]:
        async def admit() -> None:
            await send_header(context)

        caller = DocumentCaller(priority_of(context), time_left(context), admit)
        model = await self._model_of(request)
        decoding = converters.decoding_of(request.decoding, model)
        # Closed here, so that everything of the document has ended when the call has.
        async with contextlib.aclosing(self._documents.read(request, model, decoding, caller)) as responses:
            async for response in responses:
                yield response

    async def ListModels(
        self, request: ocr_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> ocr_pb2.ListModelsResponse:
        return model_converters.models(await self._models.listed())

    async def LoadModel(
        self, request: ocr_pb2.LoadModelRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[ocr_pb2.LoadModelResponse]:
        began = time.monotonic()
        job = model_converters.load_job(request)
        name = await self._models.known(request.name, field="name")
        label_call(model=name, hardware="")
        sequence = 0
        async with contextlib.aclosing(self._models.load(job)) as course:
            async for event in course:
                if not sequence:
                    await send_header(context)
                if isinstance(event, ModelInfo):
                    elapsed_ms = (time.monotonic() - began) * 1000
                    response = model_converters.load_result(event, elapsed_ms=elapsed_ms)
                else:
                    response = model_converters.load_progress(event)
                sequence += 1
                response.sequence = sequence
                yield response

    async def UnloadModel(
        self, request: ocr_pb2.UnloadModelRequest, context: grpc.aio.ServicerContext
    ) -> ocr_pb2.UnloadModelResponse:
        name = await self._models.known(request.name, field="name")
        label_call(model=name, hardware="")
        return ocr_pb2.UnloadModelResponse(model=model_converters.model(await self._models.unload(name)))

    async def Embed(self, request: ocr_pb2.EmbedRequest, context: grpc.aio.ServicerContext) -> ocr_pb2.EmbedResponse:
        priority = priority_of(context)
        model_converters.check_embed(request, self._settings)
        for index, image in enumerate(request.images):
            check_size(image.content, self._limits, f"images[{index}].content")
        model = await self._model_of(request)
        wanted = model_converters.embed_job(request, model, self._settings)
        # Encoding an image is some half of reading it greedily.
        cost = 0.5 * len(request.images)
        async with self._host.admit(priority=priority, time_left_s=time_left(context), cost=cost) as job:
            job.start(msgspec.structs.replace(wanted, lines=await self._lines(request.images)))
            async for event in job:
                if isinstance(event, Finished):
                    made = msgspec.msgpack.decode(event.payload, type=Embedding)
                    return model_converters.embedding(made, model, queue_ms=job.queue_ms, engine_ms=job.engine_ms)
        raise faults.internal("the engine ended a call without a result")

    async def _lines(self, encoded: Sequence[common_pb2.Image]) -> tuple[Line, ...]:
        """Decode the images of one call, one after another, so that it takes one thread; all count as one image."""
        loop = asyncio.get_running_loop()
        lines: list[Line] = []
        pixels = 0
        for index, image in enumerate(encoded):
            field = f"images[{index}].content"
            line = await loop.run_in_executor(self._decoders, images.decode, image.content, self._limits, field)
            pixels += line.width * line.height
            if pixels > self._limits.max_pixels:
                raise faults.too_large(
                    "images",
                    "IMAGE_TOO_MANY_PIXELS",
                    f"the first {index + 1} images have {pixels} pixels together, more than the limit of"
                    f" {self._limits.max_pixels} a call; send fewer or scale them down",
                    limit_pixels=self._limits.max_pixels,
                )
            lines.append(line)
        return tuple(lines)

    # --- one line ---

    async def _read_once(self, request: converters.ReadRequest, caller: _Caller) -> ocr_pb2.Recognition:
        async with self._admitted(request, caller, partials=False) as (model, job):
            async for event in job:
                if isinstance(event, Finished):
                    return self._recognition(event, model, job)
        raise faults.internal("the engine ended a call without a result")

    @contextlib.asynccontextmanager
    async def _admitted(
        self, request: converters.ReadRequest, caller: _Caller, *, partials: bool
    ) -> AsyncIterator[tuple[ModelInfo, Job]]:
        """Validate, take a place in the queue, decode the image, and start; leaving early cancels the job."""
        content = request.image.content
        check_size(content, self._limits)
        model = await self._model_of(request)
        decoding = converters.decoding_of(request.decoding, model)
        job = self._host.admit(
            priority=caller.priority, time_left_s=time_left(caller.context), cost=float(decoding.beam_width)
        )
        async with job:
            loop = asyncio.get_running_loop()
            line = await loop.run_in_executor(self._decoders, images.decode, content, self._limits)
            job.start(ReadJob(model.name, line, decoding, partials))
            yield model, job

    def _stream_response(self, event: HostEvent, model: ModelInfo, job: Job) -> ocr_pb2.StreamRecognizeResponse:
        match event:
            case Queued(position):
                return converters.queued(position)
            case Accepted():
                return converters.started(model)
            case Update(payload=payload):
                return converters.partial(msgspec.msgpack.decode(payload, type=Partial))
            case Finished():
                return converters.result(self._recognition(event, model, job))

    def _recognition(self, event: Finished, model: ModelInfo, job: Job) -> ocr_pb2.Recognition:
        read = msgspec.msgpack.decode(event.payload, type=Recognition)
        self._count_reading(read, model)
        return converters.recognition(read, model, queue_ms=job.queue_ms, engine_ms=job.engine_ms)

    def _count_reading(self, read: Recognition, model: ModelInfo) -> None:
        self._metrics.tokens.labels(model.name).inc(read.decoded_token_count)
        if not read.blank:
            self._metrics.batch_size.labels(model.name).observe(read.mean_batch_rows)

    async def _model_of(self, request: ModelRequest) -> ModelInfo:
        """The model that a request means, loaded first if it is not; raises Fault."""
        hints = () if isinstance(request, ocr_pb2.EmbedRequest) else request.language_hints
        model = await self._models.chosen(request.model, hints)
        label_call(model=model.name, hardware=model.hardware, runtime=model.runtime, version=model.version)
        return model

    # --- many lines ---

    async def _feed(
        self,
        requests: AsyncIterator[ocr_pb2.BatchRecognizeRequest],
        caller: _Caller,
        places: asyncio.Semaphore,
        answers: "asyncio.Queue[ocr_pb2.BatchRecognizeResponse | None]",
    ) -> None:
        """Read items as places become free; puts an answer for each, and None when there will be no more."""
        seen: set[str] = set()
        tasks: set[asyncio.Task[None]] = set()

        async def item(request: ocr_pb2.BatchRecognizeRequest) -> None:
            answers.put_nowait(await self._answer(request, caller, seen))

        try:
            try:
                await places.acquire()
                count = 0
                async for request in requests:
                    count += 1
                    self._check_item_count(count)
                    task = asyncio.create_task(item(request))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                    await places.acquire()
            except Fault:
                # The stream is broken off, and what was taken in before is answered all the same.
                await asyncio.gather(*tasks)
                raise
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            answers.put_nowait(None)

    def _check_item_count(self, count: int) -> None:
        limit = self._settings.batch_item_limit
        if count > limit:
            raise faults.too_large(
                "requests", "TOO_MANY_ITEMS", f"a stream may have {limit} items; open another for the rest", limit=limit
            )

    async def _answer(
        self, request: ocr_pb2.BatchRecognizeRequest, caller: _Caller, seen: set[str]
    ) -> ocr_pb2.BatchRecognizeResponse:
        try:
            converters.check_item_id(request.id, seen)
            return converters.item_result(request.id, await self._read_once(request, caller))
        except Fault as fault:
            return converters.item_error(request.id, errors.to_status(fault))
        except Exception:
            log.exception("batch item failed")
            defect = faults.internal("a defect of the service; its log has more")
            return converters.item_error(request.id, errors.to_status(defect))
