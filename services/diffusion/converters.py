"""Protobuf to the structs of domain.py and back; the only file that knows both."""

from collections.abc import Mapping
from typing import Any

import msgspec

from inkwell.common.v1 import common_pb2
from inkwell.diffusion.v1 import diffusion_pb2 as pb
from services.diffusion.domain import (
    Asked,
    AskedControl,
    AskedFreeU,
    AskedHires,
    AskedImagePrompt,
    AskedInpaint,
    AskedLora,
    AskedOutpaint,
    AskedPerturbedAttention,
    AskedRefiner,
    EngineInfo,
    Painted,
    PaintJob,
    Parameters,
    PreviewPainted,
    Sampling,
    StepDone,
    Vae,
    Variation,
    shortest_float32,
)
from services.diffusion.scheduler_table import SchedulerEntry

PREVIEW_MEDIA_TYPE = "image/jpeg"

# Enum numbers to the words of domain.py; 0 is unset everywhere.
_PREVIEW_METHODS = {pb.PREVIEW_METHOD_TINY_AUTOENCODER: "tiny_autoencoder", pb.PREVIEW_METHOD_LINEAR: "linear"}
_SYNTAXES = {pb.PROMPT_SYNTAX_WEIGHTED: "weighted", pb.PROMPT_SYNTAX_PLAIN: "plain"}
_FILLS = {
    pb.MASK_FILL_ORIGINAL: "original",
    pb.MASK_FILL_SURROUNDINGS: "surroundings",
    pb.MASK_FILL_NOISE: "noise",
    pb.MASK_FILL_GREY: "grey",
}
_SIGMA_SCHEDULES = {
    pb.SIGMA_SCHEDULE_KARRAS: "karras",
    pb.SIGMA_SCHEDULE_EXPONENTIAL: "exponential",
    pb.SIGMA_SCHEDULE_BETA: "beta",
}
_SPACINGS = {
    pb.TIMESTEP_SPACING_LEADING: "leading",
    pb.TIMESTEP_SPACING_LINSPACE: "linspace",
    pb.TIMESTEP_SPACING_TRAILING: "trailing",
}
_PREDICTION_TYPES = {
    pb.PREDICTION_TYPE_EPSILON: "epsilon",
    pb.PREDICTION_TYPE_V_PREDICTION: "v_prediction",
    pb.PREDICTION_TYPE_SAMPLE: "sample",
}
# Messages whose fields are those of the struct of the same name.
_PLAIN_MESSAGES: dict[str, Any] = {
    "hires": pb.Hires,
    "refiner": pb.Refiner,
    "perturbed_attention": pb.PerturbedAttention,
    "freeu": pb.FreeU,
    "variation": pb.Variation,
    "vae": pb.Vae,
}


def to_asked(request: pb.GenerateRequest) -> Asked:
    """The request as plain data, unset fields None."""
    unknown: list[str] = []

    def choice(field: str, number: int, choices: Mapping[Any, Any]) -> Any:
        if number and number not in choices:
            unknown.append(field)
        return choices.get(number)

    preview, sampling = request.preview, request.sampling
    return Asked(
        model=request.model,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=_given(request, "width"),
        height=_given(request, "height"),
        step_count=_given(request, "step_count"),
        guidance_scale=_given(request, "guidance_scale"),
        scheduler=request.scheduler,
        seed=_given(request, "seed"),
        image_count=_given(request, "image_count"),
        batch_count=_given(request, "batch_count"),
        media_type=request.output.media_type,
        quality=_given(request.output, "quality"),
        preview_disabled=preview.disabled,
        preview_interval=_given(preview, "step_interval"),
        preview_method=choice("preview.method", preview.method, _PREVIEW_METHODS),
        preview_max_side_px=_given(preview, "max_side_px"),
        progress_interval_ms=_given(request, "progress_interval_ms"),
        prompt_syntax=choice("prompt_syntax", request.prompt_syntax, _SYNTAXES),
        styles=tuple(request.styles),
        wildcard_seed=_given(request, "wildcard_seed"),
        image=request.image.content if request.HasField("image") else None,
        strength=_given(request, "strength"),
        inpaint=_inpaint(request, choice),
        outpaint=_outpaint(request, choice),
        controls=tuple(
            AskedControl(
                model=control.model,
                image=control.image.content,
                preprocessor=control.preprocessor,
                scale=_given(control, "scale"),
                start=_given(control, "start"),
                end=_given(control, "end"),
            )
            for control in request.controls
        ),
        image_prompts=tuple(
            AskedImagePrompt(prompt.adapter, prompt.image.content, _given(prompt, "scale"))
            for prompt in request.image_prompts
        ),
        loras=tuple(AskedLora(lora.name, _given(lora, "weight")) for lora in request.loras),
        hires=_hires(request),
        refiner=AskedRefiner(request.refiner.model, _given(request.refiner, "switch_at"))
        if request.HasField("refiner")
        else None,
        sampling=Sampling(
            sigma_schedule=choice("sampling.sigma_schedule", sampling.sigma_schedule, _SIGMA_SCHEDULES),
            timestep_spacing=choice("sampling.timestep_spacing", sampling.timestep_spacing, _SPACINGS),
            prediction_type=choice("sampling.prediction_type", sampling.prediction_type, _PREDICTION_TYPES),
            eta=_given(sampling, "eta"),
            timesteps=tuple(sampling.timesteps),
            sigmas=tuple(map(shortest_float32, sampling.sigmas)),
        ),
        guidance_rescale=_given(request, "guidance_rescale"),
        perturbed_attention=AskedPerturbedAttention(
            _given(request.perturbed_attention, "scale"), _given(request.perturbed_attention, "adaptive_scale")
        )
        if request.HasField("perturbed_attention")
        else None,
        freeu=AskedFreeU(*(_given(request.freeu, field) for field in ("s1", "s2", "b1", "b2")))
        if request.HasField("freeu")
        else None,
        clip_skip=_given(request, "clip_skip"),
        variation=Variation(request.variation.seed, shortest_float32(request.variation.strength))
        if request.HasField("variation")
        else None,
        vae=Vae(request.vae.name, request.vae.tiled, request.vae.upcast) if request.HasField("vae") else None,
        unknown_enums=tuple(unknown),
    )


def _given(message: Any, field: str) -> Any:
    """The field's value, None when unset; floats as the shortest decimal that travelled."""
    if not message.HasField(field):
        return None
    value = getattr(message, field)
    return shortest_float32(value) if isinstance(value, float) else value


def _inpaint(request: pb.GenerateRequest, choice: Any) -> AskedInpaint | None:
    if not request.HasField("inpaint"):
        return None
    inpaint = request.inpaint
    return AskedInpaint(
        mask=inpaint.mask.content,
        blur_px=_given(inpaint, "blur_px"),
        inverted=inpaint.inverted,
        crop_padding_px=_given(inpaint, "crop_padding_px"),
        fill=choice("inpaint.fill", inpaint.fill, _FILLS),
    )


def _outpaint(request: pb.GenerateRequest, choice: Any) -> AskedOutpaint | None:
    if not request.HasField("outpaint"):
        return None
    outpaint = request.outpaint
    return AskedOutpaint(
        left_px=outpaint.left_px,
        top_px=outpaint.top_px,
        right_px=outpaint.right_px,
        bottom_px=outpaint.bottom_px,
        blur_px=_given(outpaint, "blur_px"),
        fill=choice("outpaint.fill", outpaint.fill, _FILLS),
    )


def _hires(request: pb.GenerateRequest) -> AskedHires | None:
    if not request.HasField("hires"):
        return None
    hires = request.hires
    return AskedHires(
        scale=_given(hires, "scale"),
        width=_given(hires, "width"),
        height=_given(hires, "height"),
        upscaler=hires.upscaler,
        step_count=_given(hires, "step_count"),
        strength=_given(hires, "strength"),
    )


def to_queued(position: int) -> pb.GenerateResponse:
    return pb.GenerateResponse(queued=common_pb2.Queued(position=position))


def to_started(info: EngineInfo, model: str) -> pb.GenerateResponse:
    loaded = info.model(model)
    runtime = loaded.runtime if loaded is not None else info.runtime
    started = common_pb2.Started(hardware=info.hardware, runtime=runtime, model=model)
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
            image=common_pb2.Image(content=content, media_type=job.media_type), parameters=to_parameters(parameters)
        )
        for content, parameters in zip(painted.images, job.pictures, strict=True)
    ]
    timing = common_pb2.Timing(queue_ms=queue_ms, engine_ms=engine_ms)
    conditions = [common_pb2.Image(content=content, media_type="image/png") for content in painted.control_images]
    return pb.GenerateResponse(
        result=pb.GenerateResult(images=images, timing=timing, warnings=painted.warnings, control_images=conditions)
    )


def to_parameters(parameters: Parameters) -> pb.GenerationParameters:
    """Field by field under the same names; enums by their names' endings."""
    plain: dict[str, Any] = {
        field: value
        for field in pb.GenerationParameters.DESCRIPTOR.fields_by_name
        if field != "prompt_syntax" and isinstance(value := getattr(parameters, field), str | int | float)
    }
    message = pb.GenerationParameters(
        **plain,
        styles=parameters.styles,
        prompt_syntax=_number(_SYNTAXES, parameters.prompt_syntax),
        controls=[pb.ControlParameters(**_fields(control)) for control in parameters.controls],
        image_prompts=[pb.ImagePromptParameters(**_fields(prompt)) for prompt in parameters.image_prompts],
        loras=[pb.Lora(**_fields(lora)) for lora in parameters.loras],
    )
    if (inpaint := parameters.inpaint) is not None:
        message.inpaint.CopyFrom(pb.InpaintParameters(**{**_fields(inpaint), "fill": _number(_FILLS, inpaint.fill)}))
    if (outpaint := parameters.outpaint) is not None:
        message.outpaint.CopyFrom(pb.Outpaint(**{**_fields(outpaint), "fill": _number(_FILLS, outpaint.fill)}))
    sampling = parameters.sampling
    if sampling != Sampling():
        message.sampling.CopyFrom(
            pb.Sampling(
                sigma_schedule=_number(_SIGMA_SCHEDULES, sampling.sigma_schedule),
                timestep_spacing=_number(_SPACINGS, sampling.timestep_spacing),
                prediction_type=_number(_PREDICTION_TYPES, sampling.prediction_type),
                eta=sampling.eta,
                timesteps=sampling.timesteps,
                sigmas=sampling.sigmas,
            )
        )
    for field, kind in _PLAIN_MESSAGES.items():
        if (value := getattr(parameters, field)) is not None:
            getattr(message, field).CopyFrom(kind(**_fields(value)))
    return message


def _fields(struct: msgspec.Struct) -> dict[str, Any]:
    return {name: value for name, value in msgspec.structs.asdict(struct).items() if value is not None}


def _number(choices: Mapping[Any, Any], name: str | None) -> Any:
    return next((number for number, choice in choices.items() if choice == name), 0)


def to_scheduler(entry: SchedulerEntry) -> pb.Scheduler:
    return pb.Scheduler(
        name=entry.name,
        diffusers_class=entry.diffusers_class,
        description=entry.description,
        aliases=entry.aliases,
        sampling_options=entry.sampling_options,
    )
