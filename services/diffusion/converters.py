"""Protobuf to the structs of domain.py and back; the only file that knows both."""

from typing import Any

from inkwell.common.v1 import common_pb2
from inkwell.diffusion.v1 import diffusion_pb2 as pb
from services.diffusion.domain import (
    Asked,
    EngineInfo,
    ModelInfo,
    Painted,
    PaintJob,
    Parameters,
    PreviewPainted,
    StepDone,
)
from services.diffusion.scheduler_table import SchedulerEntry

PREVIEW_MEDIA_TYPE = "image/jpeg"


def to_asked(request: pb.GenerateRequest) -> Asked:
    """The request as plain data, unset fields None."""

    def given(message: Any, field: str) -> Any:
        return getattr(message, field) if message.HasField(field) else None

    return Asked(
        model=request.model,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=given(request, "width"),
        height=given(request, "height"),
        step_count=given(request, "step_count"),
        guidance_scale=given(request, "guidance_scale"),
        scheduler=request.scheduler,
        seed=given(request, "seed"),
        image_count=given(request, "image_count"),
        media_type=request.output.media_type,
        quality=given(request.output, "quality"),
        preview_disabled=request.preview.disabled,
        preview_interval=given(request.preview, "step_interval"),
    )


def to_queued(position: int) -> pb.GenerateResponse:
    return pb.GenerateResponse(queued=common_pb2.Queued(position=position))


def to_started(info: EngineInfo, model: str) -> pb.GenerateResponse:
    started = common_pb2.Started(hardware=info.hardware, runtime=info.runtime, model=model)
    return pb.GenerateResponse(started=started)


def to_progress(done: StepDone) -> pb.GenerateResponse:
    progress = common_pb2.Progress(step=done.step, step_count=done.step_count, eta_ms=done.eta_ms)
    return pb.GenerateResponse(progress=progress)


def to_preview(painted: PreviewPainted) -> pb.GenerateResponse:
    images = [common_pb2.Image(content=content, media_type=PREVIEW_MEDIA_TYPE) for content in painted.images]
    return pb.GenerateResponse(preview=pb.Preview(step=painted.step, images=images))


def to_result(painted: Painted, job: PaintJob, *, queue_ms: float, engine_ms: float) -> pb.GenerateResponse:
    images = [
        pb.GeneratedImage(
            image=common_pb2.Image(content=content, media_type=job.media_type),
            parameters=to_parameters(job.parameters_of(i)),
        )
        for i, content in enumerate(painted.images)
    ]
    timing = common_pb2.Timing(queue_ms=queue_ms, engine_ms=engine_ms)
    return pb.GenerateResponse(result=pb.GenerateResult(images=images, timing=timing, warnings=painted.warnings))


def to_parameters(parameters: Parameters) -> pb.GenerationParameters:
    return pb.GenerationParameters(
        model=parameters.model,
        prompt=parameters.prompt,
        negative_prompt=parameters.negative_prompt,
        width=parameters.width,
        height=parameters.height,
        step_count=parameters.step_count,
        guidance_scale=parameters.guidance_scale,
        scheduler=parameters.scheduler,
        seed=parameters.seed,
    )


def to_model(model: ModelInfo, info: EngineInfo, *, ready: bool, is_default: bool) -> pb.Model:
    return pb.Model(
        name=model.name,
        state=common_pb2.MODEL_STATE_READY if ready else common_pb2.MODEL_STATE_LOADING,
        hardware=info.hardware,
        runtime=info.runtime,
        dtype=model.dtype,
        parameter_count=model.parameter_count,
        pipeline=model.pipeline,
        default_width=model.default_width,
        default_height=model.default_height,
        size_multiple=model.size_multiple,
        default_step_count=model.default_step_count,
        default_guidance_scale=model.default_guidance_scale,
        default_scheduler=model.default_scheduler,
        prompt_token_limit=model.prompt_token_limit,
        has_preview_autoencoder=model.has_preview_autoencoder,
        is_default=is_default,
    )


def to_loading_model(name: str, *, is_default: bool) -> pb.Model:
    """A model of the table about which nothing is known before the engine has read it."""
    return pb.Model(name=name, state=common_pb2.MODEL_STATE_LOADING, is_default=is_default)


def to_scheduler(entry: SchedulerEntry) -> pb.Scheduler:
    return pb.Scheduler(name=entry.name, diffusers_class=entry.diffusers_class, description=entry.description)
