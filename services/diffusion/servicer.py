"""The gRPC surface of the diffusion service: validate, convert, submit, stream back."""

import time
from collections.abc import AsyncIterator

import grpc
import msgspec
from prometheus_client import Histogram

from inkwell.diffusion.v1 import diffusion_pb2 as pb
from inkwell.diffusion.v1 import diffusion_pb2_grpc
from services.diffusion import converters, limits
from services.diffusion.domain import EngineInfo, JobUpdate, Painted, PaintJob, PreviewPainted, StepDone
from services.diffusion.scheduler_table import TABLE
from services.diffusion.settings import Settings
from services.kit.call import label_call, priority_of, time_left
from services.kit.engine_api import Accepted, Finished, Update
from services.kit.engine_host import EngineHost, engine_not_ready
from services.kit.job import Job, Queued
from services.kit.metrics import Metrics

_STEP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_FIRST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

_updates: msgspec.msgpack.Decoder[JobUpdate] = msgspec.msgpack.Decoder(JobUpdate)
_results = msgspec.msgpack.Decoder(Painted)


class DiffusionServicer(diffusion_pb2_grpc.DiffusionServiceServicer):
    """DiffusionService. Raises Fault for what goes wrong; the kit's boundary makes statuses of them."""

    def __init__(self, settings: Settings, host: EngineHost, metrics: Metrics) -> None:
        self._settings = settings
        self._host = host
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
            buckets=_FIRST_BUCKETS,
            registry=metrics.registry,
        )

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        arrived = time.monotonic()
        priority, time_left_s = priority_of(context), time_left(context)
        info = self._info()
        if info is None:
            raise engine_not_ready()
        job = limits.resolve(converters.to_asked(request), info, self._settings)
        model = info.model(job.parameters.model)
        assert model is not None, "resolve answers only models of info"
        label_call(model=model.name, hardware=info.hardware)
        cost = limits.cost(job, model)
        sequence = 0
        async with self._host.admit(priority=priority, time_left_s=time_left_s, cost=cost) as admitted:
            await context.send_initial_metadata(())
            admitted.start(job)
            first = True
            async for response in self._responses(admitted, job, info):
                if first and response.HasField("progress"):
                    self._first_progress_seconds.observe(time.monotonic() - arrived)
                    first = False
                sequence += 1
                response.sequence = sequence
                yield response

    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        default = self._settings.model_of_empty_name
        info = self._info()
        if info is None:
            loading = [converters.to_loading_model(name, is_default=name == default) for name in self._settings.models]
            return pb.ListModelsResponse(models=loading)
        return pb.ListModelsResponse(
            models=[
                converters.to_model(model, info, ready=self._host.ready, is_default=model.name == default)
                for model in info.models
            ]
        )

    async def ListSchedulers(
        self, request: pb.ListSchedulersRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListSchedulersResponse:
        return pb.ListSchedulersResponse(schedulers=[converters.to_scheduler(entry) for entry in TABLE.values()])

    async def _responses(self, admitted: Job, job: PaintJob, info: EngineInfo) -> AsyncIterator[pb.GenerateResponse]:
        model = job.parameters.model
        async for event in admitted:
            match event:
                case Queued(position):
                    yield converters.to_queued(position)
                case Accepted():
                    yield converters.to_started(info, model)
                case Update(payload=payload):
                    match _updates.decode(payload):
                        case StepDone() as done:
                            each_s = done.compute_s / job.image_count
                            self._step_seconds.labels(self._metrics.model_label(model)).observe(each_s)
                            yield converters.to_progress(done)
                        case PreviewPainted() as painted:
                            yield converters.to_preview(painted)
                case Finished(payload=payload):
                    yield converters.to_result(
                        _results.decode(payload), job, queue_ms=admitted.queue_ms, engine_ms=admitted.engine_ms
                    )

    def _info(self) -> EngineInfo | None:
        raw = self._host.info
        return None if raw is None else msgspec.msgpack.decode(raw, type=EngineInfo)
