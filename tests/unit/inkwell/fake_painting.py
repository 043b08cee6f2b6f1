"""The fake diffusion service.

A picture is of one colour, decided by its parameters, which are embedded as the service does it. A prompt "hold" waits
after its second step. Pictures that go in may be any bytes but b"bad".
"""

import hashlib
import io
import json
from collections.abc import Iterator
from typing import Any

from google.protobuf.message import Message
from PIL import Image, PngImagePlugin

from inkwell.common.v1 import common_pb2
from inkwell.diffusion.v1 import diffusion_pb2, diffusion_pb2_grpc
from services.kit import faults

# Fields of a request that stand in the parameters as they are, where they are set.
_SAME = (
    "wildcard_seed", "strength", "outpaint", "hires", "refiner", "sampling", "guidance_rescale", "perturbed_attention",
    "freeu", "clip_skip", "variation", "vae",
)  # fmt: skip


class PaintingServicer(diffusion_pb2_grpc.DiffusionServiceServicer):
    def __init__(self, server: Any) -> None:
        self._server = server

    def Generate(self, request: Any, context: Any) -> Iterator[Any]:
        self._server.admit(request, context)
        answer = diffusion_pb2.GenerateResponse
        if request.scheduler and request.scheduler not in self._server.schedulers_known:
            self._server.refuse(
                context,
                faults.not_found("scheduler", request.scheduler, self._server.schedulers_known, field="scheduler"),
            )
        if request.HasField("step_count") and not 1 <= request.step_count <= 1000:
            fault = faults.invalid_field("step_count", f"{request.step_count} is not within 1 to 1000")
            self._server.refuse(context, fault)
        if request.image.content == b"bad":
            self._server.refuse(context, faults.invalid_field("image.content", "not a picture"))
        for place, each in enumerate(request.controls):
            if each.image.content == b"bad":
                self._server.refuse(context, faults.invalid_field(f"controls[{place}].image.content", "not a picture"))
        count = (request.image_count or 1) * (request.batch_count or 1)
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
            if not request.preview.disabled and step % (request.preview.step_interval or 1) == 0:
                images = [
                    common_pb2.Image(content=encoded(each.parameters, "image/jpeg"), media_type="image/jpeg")
                    for each in pictures
                ]
                yield answer(sequence=next(sequence), preview=diffusion_pb2.Preview(step=step, images=images))
        if not self._server.end_without_result:
            warnings = ["the prompt was cut off after 77 tokens"] if len(request.prompt) > 300 else []
            conditions = [
                common_pb2.Image(content=b"condition of " + each.image.content, media_type="image/png")
                for each in request.controls
            ]
            result = diffusion_pb2.GenerateResult(
                images=pictures,
                timing=common_pb2.Timing(queue_ms=0.5, engine_ms=2000),
                warnings=warnings,
                control_images=conditions,
            )
            yield answer(sequence=next(sequence), result=result)

    def ListModels(self, request: Any, context: Any) -> Any:
        self._server.admit(request, context)
        return diffusion_pb2.ListModelsResponse(models=[brush(self._server.painter)])

    def LoadModel(self, request: Any, context: Any) -> Iterator[Any]:
        self._server.admit(request, context)
        self._know(request.name, context)
        answer, progress = diffusion_pb2.LoadModelResponse, diffusion_pb2.LoadProgress
        yield answer(sequence=1, progress=progress(stage=diffusion_pb2.LOAD_STAGE_WAITING))
        reading = progress(stage=diffusion_pb2.LOAD_STAGE_READING_WEIGHTS, evicted_models=["old"])
        yield answer(sequence=2, progress=reading)
        yield answer(sequence=3)  # an event of a later version
        if request.name == "hold":
            self._server.hold(context)
        yield answer(sequence=4, progress=progress(stage=diffusion_pb2.LOAD_STAGE_WARMING))
        model = brush(request.name)
        model.state = common_pb2.MODEL_STATE_READY
        yield answer(sequence=5, result=diffusion_pb2.LoadResult(model=model))

    def UnloadModel(self, request: Any, context: Any) -> Any:
        self._server.admit(request, context)
        self._know(request.name, context)
        model = brush(request.name)
        model.state = common_pb2.MODEL_STATE_UNLOADED
        model.memory_bytes = 0
        return diffusion_pb2.UnloadModelResponse(model=model)

    def ListSchedulers(self, request: Any, context: Any) -> Any:
        self._server.admit(request, context)
        return diffusion_pb2.ListSchedulersResponse(
            schedulers=[
                diffusion_pb2.Scheduler(
                    name=name,
                    diffusers_class=name.upper(),
                    description=f"Take {name}.",
                    aliases=[name.capitalize(), f"{name} a"],
                    sampling_options=["eta"],
                )
                for name in self._server.schedulers_known
            ]
        )

    def ListAdapters(self, request: Any, context: Any) -> Any:
        self._server.admit(request, context)
        adapter = diffusion_pb2.Adapter
        return diffusion_pb2.ListAdaptersResponse(
            adapters=[
                adapter(name="flat", kind=diffusion_pb2.ADAPTER_KIND_LORA, models=["brush"], file_bytes=1_500_000),
                adapter(name="<cat>", kind=diffusion_pb2.ADAPTER_KIND_TEXTUAL_INVERSION),
                adapter(name="ip", kind=diffusion_pb2.ADAPTER_KIND_IMAGE_PROMPT, models=["brush", "other"]),
                adapter(name="later", kind=99),  # type: ignore[arg-type]  # a kind of a later version
            ]
        )

    def ListControls(self, request: Any, context: Any) -> Any:
        self._server.admit(request, context)
        control = diffusion_pb2.ControlModel
        return diffusion_pb2.ListControlsResponse(
            models=[
                control(
                    name="edges", kind=diffusion_pb2.CONTROL_KIND_CONTROLNET, models=["brush"], preprocessor="canny"
                ),
                control(name="sketch", kind=diffusion_pb2.CONTROL_KIND_T2I_ADAPTER),
            ],
            preprocessors=[diffusion_pb2.Preprocessor(name="canny", description="Thin lines along edges.")],
        )

    def _know(self, name: str, context: Any) -> None:
        known = (self._server.painter, "hold")
        if name not in known:
            self._server.refuse(context, faults.not_found("model", name, known, field="name"))


def brush(name: str = "brush") -> diffusion_pb2.Model:
    return diffusion_pb2.Model(
        name=name, state=common_pb2.MODEL_STATE_LOADING, hardware="cpu", runtime="torch", dtype="bfloat16",
        parameter_count=9_000_000, pipeline="StableDiffusionPipeline", default_width=64, default_height=64,
        size_multiple=8, default_step_count=20, default_guidance_scale=2.5, default_scheduler="euler",
        prompt_token_limit=77, has_preview_autoencoder=True, is_default=True, file_bytes=36_000_000,
        memory_bytes=18_000_000, vaes=["sharp"], features=["image", "loras"], schedulers=["euler", "ddim"],
    )  # fmt: skip


def picture(request: Any, number: int) -> diffusion_pb2.GeneratedImage:
    """Picture `number` of a call; "__animal__" in its prompt becomes a cat, a style is appended."""
    filled = ", ".join([request.prompt.replace("__animal__", "cat"), *request.styles])
    parameters = diffusion_pb2.GenerationParameters(
        model=request.model or "brush",
        prompt=filled,
        prompt_template=request.prompt if filled != request.prompt else "",
        negative_prompt=request.negative_prompt,
        width=request.width or 16,
        height=request.height or 8,
        step_count=request.step_count or 20,
        guidance_scale=request.guidance_scale if request.HasField("guidance_scale") else 2.5,
        scheduler=request.scheduler or "euler",
        seed=(request.seed if request.HasField("seed") else 1000) + number,
        prompt_syntax=request.prompt_syntax or diffusion_pb2.PROMPT_SYNTAX_WEIGHTED,
        styles=request.styles,
        loras=request.loras,
        image_sha256=digest(request.image) if request.HasField("image") else "",
    )
    for name in _SAME:
        if request.HasField(name):
            value = getattr(request, name)
            if isinstance(value, Message):
                getattr(parameters, name).CopyFrom(value)
            else:
                setattr(parameters, name, value)
    if request.HasField("inpaint"):
        inpaint = request.inpaint
        parameters.inpaint.CopyFrom(
            diffusion_pb2.InpaintParameters(
                mask_sha256=digest(inpaint.mask), blur_px=inpaint.blur_px, inverted=inpaint.inverted,
                crop_padding_px=inpaint.crop_padding_px if inpaint.HasField("crop_padding_px") else None,
                fill=inpaint.fill or diffusion_pb2.MASK_FILL_ORIGINAL,
            )
        )  # fmt: skip
    for each in request.controls:
        parameters.controls.add(
            model=each.model or "edges", image_sha256=digest(each.image), preprocessor=each.preprocessor,
            scale=each.scale if each.HasField("scale") else 1, start=each.start,
            end=each.end if each.HasField("end") else 1,
        )  # fmt: skip
    for each in request.image_prompts:
        scale = each.scale if each.HasField("scale") else 1
        parameters.image_prompts.add(adapter=each.adapter or "ip", image_sha256=digest(each.image), scale=scale)
    media_type = request.output.media_type or "image/png"
    image = common_pb2.Image(content=encoded(parameters, media_type), media_type=media_type)
    return diffusion_pb2.GeneratedImage(image=image, parameters=parameters)


def digest(image: common_pb2.Image) -> str:
    return hashlib.sha256(image.content).hexdigest()


def encoded(parameters: diffusion_pb2.GenerationParameters, media_type: str) -> bytes:
    values = as_json(parameters)
    for name in [name for name, value in values.items() if value in (None, []) or (value == "" and name != "prompt")]:
        del values[name]
    values.setdefault("negative_prompt", "")
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


def as_json(message: Message) -> dict[str, Any]:
    """As the service embeds it: names of enum values without their prefix, None for what is unset."""
    values: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.is_repeated:
            values[field.name] = [as_json(each) if field.message_type else each for each in value]
        elif field.has_presence and not message.HasField(field.name):
            values[field.name] = None
        elif field.message_type:
            values[field.name] = as_json(value)
        elif field.enum_type:
            prefix = field.enum_type.values_by_number[0].name.removesuffix("UNSPECIFIED")
            values[field.name] = field.enum_type.values_by_number[value].name.removeprefix(prefix).lower()
            if value == 0:
                values[field.name] = None
        else:
            values[field.name] = float(f"{value:.7g}") if isinstance(value, float) else value
    return values
