"""One picture inside the engine: from its inputs through one or more passes of a pipeline to the encoded file.

All of it runs in the picture's lane (engine/lanes.py). A pass is one call of a diffusers pipeline; most pictures are
one, a second pass at a higher size or a refiner makes it two.
"""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from services.diffusion import metadata
from services.diffusion.domain import LATENT_UPSCALERS, Hires, PaintJob, Parameters
from services.diffusion.engine import imaging, lanes, pipelines, previews
from services.diffusion.engine.decoding import Decoding
from services.diffusion.engine.layers import Layers
from services.diffusion.engine.models import LoadedModel
from services.diffusion.engine.noising import Noise, varied
from services.diffusion.engine.schedulers import draw_from
from services.kit.faults import Fault, FaultData, Kind


@dataclass
class Pass:
    """A call of a pipeline. step_count: those it will really do. mask: what to repaint, as the loop's latents."""

    pipeline: Any
    arguments: dict[str, Any]
    step_count: int
    width: int
    height: int
    noise: Noise
    mask: Tensor | None = None


@dataclass
class Start:
    """The picture to start from, prepared: at the size that is painted, and what the result is put back into.

    mask: "L", soft, of the size of `image`; None to repaint all. original, soft_mask: set with it, of one size, which
    `box` is a part of.
    """

    image: Image.Image
    mask: Image.Image | None = None
    original: Image.Image | None = None
    soft_mask: Image.Image | None = None
    box: imaging.Box | None = None


class Picture:
    """One picture on its way. step: of step_count, over all its passes."""

    def __init__(
        self,
        model: LoadedModel,
        refiner: LoadedModel | None,
        parameters: Parameters,
        job: PaintJob,
        layers: Layers,
    ) -> None:
        self.model = model
        self.parameters = parameters
        self.layers = layers
        self._refiner = refiner
        self._job = job
        self._decoding = Decoding(parameters.vae)
        self.step_count = step_count(parameters)
        self.step = 0
        self._steps_before = 0  # of the passes that are done
        self._pass: Pass | None = None
        self._prediction: previews.Prediction | None = None
        self._latents: Tensor | None = None  # as the last step left them
        self.lane = lanes.Lane(self._paint, around=layers.around, decoding=self._decoding)

    @property
    def repaired(self) -> bool:
        """Whether decoding had to be done again in float32."""
        return self._decoding.repaired

    def preview_latents(self) -> Tensor | None:
        """The clean latents that the model believes in, [1, channels, rows, columns]; None before the first step."""
        if self._pass is None or self._latents is None:
            return None
        latents = self._prediction.clean_latents() if self._prediction is not None else None
        if latents is None:
            latents = self._latents
        return torch.as_tensor(pipelines.unpack(self._pass.pipeline, latents, self._pass.width, self._pass.height))

    def control_images(self) -> tuple[bytes, ...]:
        """The conditions that steered it, PNG."""
        return self.layers.control_images()

    def advance(self) -> None:
        """One turn; raises whatever the pipeline raises."""
        self.layers.enter()
        self.lane.advance()

    def stop(self) -> None:
        """End it where it stands; without effect once it has ended."""
        self.lane.stop()

    # --- inside the lane ---

    def _paint(self) -> bytes:
        parameters = self.parameters
        start = self._start()
        self.layers.prepare(guided=self.guided, step_count=first_steps(parameters))
        first = self._first_pass(start)
        hires, refiner = parameters.hires, parameters.refiner
        if refiner is not None and self.layers.refines_by_pipeline:
            first.arguments["denoising_end"] = refiner.switch_at
            first.step_count = max(1, round(first.step_count * refiner.switch_at))
        latents_only = hires is not None and hires.upscaler in LATENT_UPSCALERS
        if refiner is not None and self.layers.refines_by_pipeline:
            latents = self._run(first, output_type="latent")
            refining = self._refining_pass(latents, first)
            image = self._run(refining, output_type="latent" if latents_only else "pt", first_step=first.step_count)
        else:
            image = self._run(first, output_type="latent" if latents_only else "pt")
        if hires is not None:
            image = self._run(self._hires_pass(hires, image), output_type="pt", is_second=True)
        self._refuse_unsound(image)
        painted = previews.to_image(image)
        if start is not None and start.original is not None and start.soft_mask is not None:
            painted = imaging.paste_back(start.original, painted, start.soft_mask, start.box)
        return metadata.encode(painted, parameters, self._job.media_type, self._job.quality)

    @property
    def guided(self) -> bool:
        """Whether every step evaluates the model without the prompt too."""
        return self.model.info.family != "flux" and self.parameters.guidance_scale > 1

    def _start(self) -> Start | None:
        parameters, job = self.parameters, self._job
        if job.image is None:
            return None
        size = parameters.width, parameters.height
        image = imaging.to_image(job.image)
        if (outpaint := parameters.outpaint) is not None:
            inner = imaging.fit(
                image,
                size[0] - outpaint.left_px - outpaint.right_px,
                size[1] - outpaint.top_px - outpaint.bottom_px,
            )
            canvas, mask = imaging.outpaint_canvas(inner, outpaint, parameters.seed)
            return Start(canvas, mask, canvas, mask)
        inpaint = parameters.inpaint
        if inpaint is None or job.mask is None:
            return Start(imaging.fit(image, *size))
        mask = imaging.to_image(job.mask)
        if inpaint.crop_padding_px is None:
            image, mask = imaging.fit(image, *size), imaging.fit(mask, *size)
        mask = imaging.prepare_mask(mask, inpaint.blur_px, inverted=inpaint.inverted)
        if inpaint.crop_padding_px is None:
            return Start(imaging.fill(image, mask, inpaint.fill, parameters.seed), mask, image, mask)
        box = imaging.crop_region(mask, inpaint.crop_padding_px, *size)
        part, part_mask = imaging.cut(image, box, *size), imaging.cut(mask, box, *size)
        # Filled only now: the whole picture may be very much larger.
        return Start(imaging.fill(part, part_mask, inpaint.fill, parameters.seed), part_mask, image, mask, box)

    def _first_pass(self, start: Start | None) -> Pass:
        parameters = self.parameters
        size = parameters.width, parameters.height
        from_image = start is not None
        pipeline = self._open(self.model, from_image=from_image)
        arguments = self._arguments(pipeline, from_image=from_image, size=size)
        noise = Noise(pipeline.scheduler, variation=parameters.variation)
        mask = None
        if start is None:
            if parameters.variation is not None and parameters.variation.strength:
                arguments["latents"] = self._varied_latents(pipeline, arguments["generator"])
        else:
            arguments["image"] = start.image
            if start.mask is not None:
                hard = imaging.hard_mask(start.mask, pipeline.vae_scale_factor)
                if pipelines.is_inpainting(self.model):
                    arguments["mask_image"] = hard
                else:
                    mask = self._latent_mask(pipeline, hard)
        return Pass(pipeline, arguments, first_steps(parameters), *size, noise, mask)

    def _hires_pass(self, hires: Hires, image: Tensor) -> Pass:
        """image: pixels of the first pass [1, 3, height, width] in 0 to 1, or its latents as the loop held them."""
        pipeline = self._open(self.model, from_image=True, step_count=hires.step_count)
        size = hires.width, hires.height
        arguments = self._arguments(pipeline, from_image=True, size=size)
        arguments |= {"num_inference_steps": hires.step_count, "strength": hires.strength}
        # Steps by hand are those of the first pass.
        arguments |= {"timesteps": None, "sigmas": None}
        if hires.upscaler in LATENT_UPSCALERS:
            assert self._pass is not None
            factor = pipeline.vae_scale_factor
            latents = pipelines.unpack(self._pass.pipeline, image, self.parameters.width, self.parameters.height)
            latents = imaging.upscale_latents(latents, hires.upscaler, size[1] // factor, size[0] // factor)
            # Pipelines size their latents by the picture; its content gives way to these latents.
            arguments["image"] = Image.new("RGB", size)
            noise = Noise(pipeline.scheduler, variation=self.parameters.variation, latents=latents)
        else:
            self._refuse_unsound(image)
            arguments["image"] = imaging.upscale(previews.to_image(image), *size, hires.upscaler)
            noise = Noise(pipeline.scheduler, variation=self.parameters.variation)
        return Pass(pipeline, arguments, _pass_steps(hires.step_count, hires.strength), *size, noise)

    def _refining_pass(self, latents: Tensor, first: Pass) -> Pass:
        assert self._refiner is not None
        assert self.parameters.refiner is not None
        pipeline = pipelines.open_pipeline(self._refiner, from_image=True)
        pipeline.scheduler = self._scheduler(self.parameters.step_count)
        size = first.width, first.height
        arguments = self._arguments(pipeline, from_image=True, size=size, own_prompt=False)
        arguments |= {"image": latents, "denoising_start": self.parameters.refiner.switch_at, "strength": None}
        count = max(1, first_steps(self.parameters) - first.step_count)
        return Pass(pipeline, arguments, count, first.width, first.height, Noise(pipeline.scheduler))

    def _open(self, model: LoadedModel, *, from_image: bool, step_count: int | None = None) -> Any:
        parameters = self.parameters
        pipeline = pipelines.open_pipeline(
            model,
            from_image=from_image,
            controlnets=self.layers.controlnets,
            pag=parameters.perturbed_attention is not None,
        )
        pipeline.scheduler = self._scheduler(step_count or parameters.step_count)
        pipeline.vae = self.layers.vae
        return pipeline

    def _scheduler(self, step_count: int) -> Any:
        return self.model.scheduler(self.parameters.scheduler, step_count, self.parameters.sampling)

    def _arguments(
        self, pipeline: Any, *, from_image: bool, size: tuple[int, int], own_prompt: bool = True
    ) -> dict[str, Any]:
        """What every pass is called with; own_prompt: as the model's own encoders and layers understand it."""
        parameters = self.parameters
        # Drawn on the CPU whatever the hardware, so that a seed means the same noise everywhere.
        generator = torch.Generator("cpu").manual_seed(parameters.seed)
        draw_from(pipeline.scheduler, generator)
        arguments: dict[str, Any] = {
            "width": size[0],
            "height": size[1],
            "generator": generator,
            "callback_on_step_end": self._on_step_end,
            **pipelines.sampling_arguments(parameters, from_image=from_image),
        }
        # After the others: encoded prompts have their clip skip in them.
        if own_prompt:
            return arguments | self.layers.arguments(pipeline, size)
        return arguments | self.layers.refining_arguments(first_steps(parameters))

    def _run(self, turn: Pass, *, output_type: str, first_step: int = 0, is_second: bool = False) -> Tensor:
        """Call the pipeline; answers pixels [1, 3, height, width] in 0 to 1, or the loop's latents for "latent"."""
        self._pass = turn
        self._prediction = previews.Prediction(turn.pipeline.scheduler)
        arguments = pipelines.accepted(turn.pipeline, {**turn.arguments, "output_type": output_type})
        self.layers.begin_pass(turn.step_count, first_step=first_step, is_second=is_second)
        output = turn.pipeline(**{name: value for name, value in arguments.items() if value is not None})
        if any(getattr(output, "nsfw_content_detected", None) or ()):
            raise _spoilt("PICTURE_WITHHELD", "the model's own safety checker withheld the picture", self.parameters)
        self._steps_before += turn.step_count
        self.step = self._steps_before
        images: Tensor = output.images
        return images

    def _on_step_end(self, pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        turn = self._pass
        assert turn is not None
        latents = tensors["latents"]
        if not bool(torch.isfinite(latents).all()):
            raise _spoilt(
                "PICTURE_NOT_FINITE",
                f"the latents are not numbers any more after step {self.step + 1}",
                self.parameters,
            )
        # Second-order schedulers evaluate the model twice a step, so count in proportion.
        count = pipeline.num_timesteps
        changed: dict[str, Any] = {}
        if turn.mask is not None:
            latents = changed["latents"] = self._outside_mask_restored(turn, latents, index, count)
        self._latents = latents
        done = (index + 1) * turn.step_count // count
        self.step = self._steps_before + done
        self.layers.step = done
        if index + 1 == count:
            lanes.pause()  # decoding is a turn of its own, so that a cancellation need not wait for it
        return changed

    def _outside_mask_restored(self, turn: Pass, latents: Tensor, index: int, count: int) -> Tensor:
        """Put the picture's own latents, as noisy as the next step expects them, where the mask is not."""
        timesteps = turn.pipeline.scheduler.timesteps
        following = len(timesteps) - count + index + 1
        assert turn.noise.original is not None
        own = turn.noise.original if following >= len(timesteps) else turn.noise.mixed(timesteps[following])
        own = pipelines.pack(turn.pipeline, own)
        assert turn.mask is not None
        blended: Tensor = turn.mask * latents + (1 - turn.mask) * own
        return blended.to(latents.dtype)

    def _latent_mask(self, pipeline: Any, mask: Image.Image) -> Tensor:
        """1 for each latent to repaint, else 0, as the loop holds latents. mask: out of `imaging.hard_mask`."""
        factor, channels = pipeline.vae_scale_factor, pipeline.vae.config.latent_channels
        marked = mask.resize((mask.width // factor, mask.height // factor), Image.Resampling.NEAREST)
        pixels = torch.frombuffer(bytearray(marked.tobytes()), dtype=torch.uint8).view(
            1, 1, marked.height, marked.width
        )
        packed: Tensor = pipelines.pack(pipeline, (pixels > 0).float().expand(1, channels, -1, -1))
        return packed.to(self.model.device)

    def _varied_latents(self, pipeline: Any, generator: torch.Generator) -> Tensor:
        """The noise that the pipeline would draw first, varied."""
        factor = pipeline.vae_scale_factor
        shape = (
            1,
            pipeline.vae.config.latent_channels,
            self.parameters.height // factor,
            self.parameters.width // factor,
        )
        noise = torch.randn(shape, generator=generator, dtype=self.model.dtype)
        packed: Tensor = pipelines.pack(pipeline, varied(noise, self.parameters.variation))
        return packed.to(self.model.device)

    def _refuse_unsound(self, pixels: Tensor) -> None:
        if not bool(torch.isfinite(pixels).all()):
            raise _spoilt("PICTURE_NOT_FINITE", "decoding gave values that are not numbers", self.parameters)
        if not bool(pixels.any()):
            raise _spoilt("PICTURE_BLACK", "every pixel came out black, the sign of a numeric failure", self.parameters)


def step_count(parameters: Parameters) -> int:
    """Steps that a picture takes over all its passes."""
    hires = parameters.hires
    return first_steps(parameters) + (_pass_steps(hires.step_count, hires.strength) if hires is not None else 0)


def first_steps(parameters: Parameters) -> int:
    """Steps of the first pass, and of the refiner that ends it."""
    return _pass_steps(parameters.step_count, parameters.strength)


def _pass_steps(count: int, strength: float | None) -> int:
    # As the image-to-image pipelines count.
    return count if strength is None else min(int(count * strength), count)


def _spoilt(reason: str, what: str, parameters: Parameters) -> Fault:
    message = (
        f"{what} (seed {parameters.seed}, scheduler {parameters.scheduler}, guidance_scale "
        f"{parameters.guidance_scale:g}); the same request will fail again: change one of these"
    )
    return Fault(FaultData(Kind.INTERNAL, reason, message, metadata={"seed": str(parameters.seed)}))
