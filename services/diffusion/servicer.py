"""The gRPC surface of the diffusion service: validate, convert, submit, stream back."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import msgspec
from prometheus_client import Histogram

from inkwell.diffusion.v1 import diffusion_pb2 as pb
from inkwell.diffusion.v1 import diffusion_pb2_grpc
from inkwell.endpoint.v1 import endpoint_pb2
from services.diffusion import converters, limits, listing, model_converters, preprocessor_table
from services.diffusion.domain import JobUpdate, ModelInfo, Painted, PaintJob, PreviewPainted, StepDone
from services.diffusion.models import Models
from services.diffusion.scheduler_table import TABLE
from services.diffusion.settings import Settings
from services.kit import engine_metrics
from services.kit.call import label_call, priority_of, send_header, time_left
from services.kit.engine_api import Accepted, Finished, Update
from services.kit.engine_host import EngineHost
from services.kit.job import Job, Queued
from services.kit.metrics import FIRST_PROGRESS_BUCKETS, Metrics

_STEP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32)

_updates: msgspec.msgpack.Decoder[JobUpdate] = msgspec.msgpack.Decoder(JobUpdate)
_results = msgspec.msgpack.Decoder(Painted)


class DiffusionServicer(diffusion_pb2_grpc.DiffusionServiceServicer):
    """DiffusionService. Raises Fault for what goes wrong; the kit's boundary makes statuses of them."""

    def __init__(self, settings: Settings, host: EngineHost, metrics: Metrics) -> None:
        self._settings = settings
        self._host = host
        self._models = Models(host, settings)
        self._metrics = metrics
        self._step_seconds = Histogram(
            "inkwell_denoise_step_seconds",
            "Time the engine spent on one denoising step of one picture.",
            ["model"],
            buckets=_STEP_BUCKETS,
            registry=metrics.registry,
        )
        self._first_progress_seconds = Histogram(
            "inkwell_first_progress_seconds",
            "Time from a call's arrival to its first finished step.",
            buckets=FIRST_PROGRESS_BUCKETS,
            registry=metrics.registry,
        )
        self._batch_size = Histogram(
            "inkwell_batch_size",
            "Pictures that a call's steps painted side by side.",
            ["model"],
            buckets=_BATCH_BUCKETS,
            registry=metrics.registry,
        )
        engine_metrics.register(metrics, host, lambda: [(m, m.memory_bytes) for m in self._models.engine_info().models])
        self._decoders = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")

    async def report(self) -> endpoint_pb2.Report:
        """What the service says of itself to whoever routes to it."""
        return model_converters.to_report(self._models.device(), await self._models.listed())

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        arrived = time.monotonic()
        priority, time_left_s = priority_of(context), time_left(context)
        asked = converters.to_asked(request)
        model = await self._models.chosen(asked.model)
        refiner = None
        if asked.refiner is not None and asked.refiner.model:
            refiner = await self._models.chosen(asked.refiner.model, field="refiner.model")
        label_call(
            model=model.name,
            hardware=self._models.engine_info().hardware,
            runtime=model.runtime.partition(" ")[0],
            version=model.version,
        )
        # On a thread: pictures are decoded, and files of styles and wildcards are read.
        job = await asyncio.get_running_loop().run_in_executor(
            self._decoders, limits.resolve, asked, model, self._settings, refiner
        )
        cost = limits.cost(job, model)
        sequence = 0
        async with self._host.admit(priority=priority, time_left_s=time_left_s, cost=cost) as admitted:
            await send_header(context)
            admitted.start(job)
            self._batch_size.labels(self._metrics.model_label(model.name)).observe(job.batch_size)
            first = True
            async for response in self._responses(admitted, job, (asked.progress_interval_ms or 0) / 1000):
                if first and response.HasField("progress"):
                    self._first_progress_seconds.observe(time.monotonic() - arrived)
                    first = False
                sequence += 1
                response.sequence = sequence
                yield response

    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        return model_converters.models(await self._models.listed())

    async def LoadModel(
        self, request: pb.LoadModelRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.LoadModelResponse]:
        name = await self._models.known(request.name, field="name")
        job = model_converters.load_job(request, name)
        label_call(model=name, hardware="")
        sequence = 0
        async with contextlib.aclosing(self._models.load(job)) as course:
            async for event in course:
                if not sequence:
                    # Only now: a refusal that comes without headers may be retried by the client's own policy.
                    await send_header(context)
                if isinstance(event, ModelInfo):
                    response = model_converters.load_result(self._models.loaded(event))
                else:
                    response = model_converters.load_progress(event)
                sequence += 1
                response.sequence = sequence
                yield response

    async def UnloadModel(
        self, request: pb.UnloadModelRequest, context: grpc.aio.ServicerContext
    ) -> pb.UnloadModelResponse:
        name = await self._models.known(request.name, field="name")
        label_call(model=name, hardware="")
        return pb.UnloadModelResponse(model=model_converters.model(await self._models.unload(name)))

    async def ListSchedulers(
        self, request: pb.ListSchedulersRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListSchedulersResponse:
        return pb.ListSchedulersResponse(schedulers=[converters.to_scheduler(entry) for entry in TABLE.values()])

    async def ListAdapters(
        self, request: pb.ListAdaptersRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListAdaptersResponse:
        return await asyncio.to_thread(listing.list_adapters, self._settings)

    async def ListControls(
        self, request: pb.ListControlsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListControlsResponse:
        preprocessors = preprocessor_table.descriptions(self._settings)
        return await asyncio.to_thread(listing.list_controls, self._settings, preprocessors)

    async def _responses(self, admitted: Job, job: PaintJob, interval_s: float) -> AsyncIterator[pb.GenerateResponse]:
        model = job.parameters.model
        next_progress = 0.0
        async for event in admitted:
            match event:
                case Queued(position):
                    yield converters.to_queued(position)
                case Accepted():
                    yield converters.to_started(self._models.engine_info(), model)
                case Update(payload=payload):
                    match _updates.decode(payload):
                        case StepDone() as done:
                            each_s = done.compute_s / job.batch_size
                            self._step_seconds.labels(self._metrics.model_label(model)).observe(each_s)
                            now = time.monotonic()
                            if now >= next_progress or done.step == done.step_count:
                                next_progress = now + interval_s
                                yield converters.to_progress(done)
                        case PreviewPainted() as painted:
                            yield converters.to_preview(painted)
                case Finished(payload=payload):
                    yield converters.to_result(
                        _results.decode(payload), job, queue_ms=admitted.queue_ms, engine_ms=admitted.engine_ms
                    )
