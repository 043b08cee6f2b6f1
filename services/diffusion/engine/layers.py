"""What one picture lays on its model: prompts, adapters, controls, another VAE, another model's last steps."""

import io
import math
from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from services.diffusion.domain import Control, PaintJob, Parameters
from services.diffusion.engine import imaging, pipelines, preprocessors
from services.diffusion.engine.adapters import Adapters, Held
from services.diffusion.engine.conditioning import Conditioning
from services.diffusion.engine.controls import LoadedControl
from services.diffusion.engine.models import LoadedModel
from services.kit import faults
from services.runtimes.diffusion_sources import ModelError


class Layers:
    """Made before anything is computed, with everything that the picture needs in memory; used inside its lane.

    held: LoRAs, embeddings, image prompts and controls. step: steps of the present pass that are done, as the picture
    tells.
    """

    def __init__(
        self,
        model: LoadedModel,
        adapters: Adapters,
        refiner: LoadedModel | None,
        parameters: Parameters,
        job: PaintJob,
        preprocessor_models: preprocessors.Models,
        under_way: Iterable[Held],
    ) -> None:
        """under_way: what all pictures that are being painted with the model hold. Raises Fault."""
        self.model = model
        self.step = 0
        self._switch = adapters.switch
        self._refiner = refiner
        self._parameters = parameters
        self._job = job
        self._preprocessor_models = preprocessor_models
        self.held = adapters.hold(parameters, under_way=under_way)
        self.vae = _vae(model, parameters)
        self._guided = False
        self._first_step = 0
        self._step_count = 1
        self._takes_over_at = math.inf
        self._conditioning: Conditioning | None = None
        self._conditions: list[Image.Image] = []
        # Of T2I-Adapters, for the present pass: what each adds to the denoiser's features.
        self._features: list[list[Tensor]] = []
        # Of a denoiser that takes the last steps over.
        self._own_of_refiner: Conditioning | None = None
        self._told_to_refiner: Tensor | None = None

    @property
    def controlnets(self) -> list[Any]:
        """The modules that a ControlNet pipeline is made with."""
        return self.held.controlnets

    @property
    def refines_by_pipeline(self) -> bool:
        """Whether the refiner is a pipeline of its own, as SDXL's is; else its denoiser takes the last steps over."""
        return self._refiner is not None and self.model.info.family == "sdxl"

    def control_images(self) -> tuple[bytes, ...]:
        """The conditions of the last pass as PNG, by parameters.controls."""
        return tuple(map(_png, self._conditions))

    def enter(self) -> None:
        """Before every turn: the shared modules as this picture needs them."""
        self._switch.to(self.held.overlay)

    # --- inside the lane ---

    def prepare(self, *, guided: bool, step_count: int) -> None:
        """Encode the prompts. guided: the denoiser is evaluated without them too. step_count: of the first pass."""
        self._guided = guided
        self._step_count = step_count
        own = self._with_embeddings(self._parameters)
        self._conditioning = self.model.conditioner.prepare(own, guided=guided, step_count=step_count)
        if self._refiner is not None and not self.refines_by_pipeline:
            self._prepare_take_over(self._refiner)

    def begin_pass(self, step_count: int, *, first_step: int = 0, is_second: bool = False) -> None:
        """A pass of so many steps begins.

        first_step: how many the pass before, which it continues, has done. is_second: it starts from the finished one.
        """
        self.step, self._first_step, self._step_count = 0, first_step, step_count
        refiner = self._parameters.refiner
        # A denoiser takes over in the first pass alone.
        self._takes_over_at = step_count * refiner.switch_at if refiner is not None and not is_second else math.inf

    def arguments(self, pipeline: Any, size: tuple[int, int]) -> dict[str, Any]:
        """What the layers add to the call of a pipeline that paints at `size` (width, height)."""
        arguments = self._prompts(self._conditioning, self._parameters)
        images = [imaging.to_image(pixels) for pixels in self._job.image_prompt_images]
        embeds = self.held.image_prompt_embeds(pipeline, images, guided=self._guided)
        if embeds is not None:
            arguments["ip_adapter_image_embeds"] = embeds
        controls = self.held.controls
        if not controls:
            return arguments
        wanted = self._parameters.controls
        self._conditions = [
            self._condition(control, use, imaging.to_image(pixels), size)
            for control, use, pixels in zip(controls, wanted, self._job.control_images, strict=True)
        ]
        if not self.controlnets:
            self._features = [
                _features(control, condition) for control, condition in zip(controls, self._conditions, strict=True)
            ]
            return arguments
        steering: dict[str, list[Any]] = {
            pipelines.condition_argument(pipeline): self._conditions,
            "controlnet_conditioning_scale": [use.scale for use in wanted],
            "control_guidance_start": [use.start for use in wanted],
            "control_guidance_end": [use.end for use in wanted],
        }
        return arguments | (steering if len(wanted) > 1 else {name: values[0] for name, values in steering.items()})

    def refining_arguments(self, step_count: int) -> dict[str, Any]:
        """The same for the refiner's pipeline, whose encoders are its own and which no layer lies on.

        step_count: of this pass and the one that it continues.
        """
        assert self._refiner is not None
        self._conditioning = self._refiner.conditioner.prepare(
            self._parameters, guided=self._guided, step_count=step_count
        )
        self._features = []
        return self._prompts(self._conditioning, self._parameters)

    # --- around the denoiser, on the engine's main greenlet ---

    def around(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Evaluate the denoiser, told what holds at this step."""
        step = self._first_step + self.step
        conditioning = self._conditioning
        if self._features and (added := self._added_features(args, kwargs)):
            kwargs = kwargs | {"down_intrablock_additional_residuals": added}
        if self._refiner is not None and self._told_to_refiner is not None and step >= self._takes_over_at:
            forward, conditioning = self._refiner.denoiser, self._own_of_refiner
            kwargs = kwargs | {"encoder_hidden_states": self._told_to_refiner}
        if conditioning is None:
            return forward(*args, **kwargs)
        return conditioning.around(step, forward, args, kwargs)

    # --- parts ---

    def _with_embeddings(self, parameters: Parameters) -> Parameters:
        """The prompts as this model's tokenizers must see them."""
        if not self.held.embeddings:
            return parameters
        return msgspec.structs.replace(
            parameters,
            prompt=self.held.prompt(parameters.prompt),
            negative_prompt=self.held.prompt(parameters.negative_prompt),
        )

    def _prompts(self, conditioning: Conditioning | None, parameters: Parameters) -> dict[str, Any]:
        if conditioning is not None:
            return dict(conditioning.arguments) | {"clip_skip": None}
        own = self._with_embeddings(parameters)
        return {"prompt": own.prompt, "negative_prompt": own.negative_prompt or None}

    def _condition(
        self, control: LoadedControl, use: Control, image: Image.Image, size: tuple[int, int]
    ) -> Image.Image:
        image = imaging.fit(image, *size)
        if use.preprocessor:
            image = preprocessors.run(use.preprocessor, image, self._preprocessor_models)
        return image.convert(control.condition_mode)

    def _added_features(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """What all T2I-Adapters that steer at this step add, for every row of the evaluation."""
        rows = (args[0] if args else kwargs["sample"]).shape[0]
        done = self.step / self._step_count
        total: list[Tensor] = []
        for use, features in zip(self._parameters.controls, self._features, strict=True):
            if not use.start <= done < use.end or not use.scale:
                continue
            scaled = [feature * use.scale for feature in features]
            total = [a + b for a, b in zip(total, scaled, strict=True)] if total else scaled
        return [feature.expand(rows, -1, -1, -1) for feature in total]

    def _prepare_take_over(self, refiner: LoadedModel) -> None:
        parameters = self._parameters
        told = refiner.conditioner.prepare(parameters, guided=self._guided, step_count=self._step_count)
        if told is not None:
            positive = told.arguments["prompt_embeds"]
            negative = told.arguments.get("negative_prompt_embeds")
        else:
            positive, negative = refiner.pipeline.encode_prompt(
                parameters.prompt, refiner.device, 1, self._guided, parameters.negative_prompt or None
            )
        self._own_of_refiner = told
        self._told_to_refiner = torch.cat([negative, positive]) if self._guided and negative is not None else positive


def _vae(model: LoadedModel, parameters: Parameters) -> Any:
    vae = parameters.vae
    if vae is None or not vae.name:
        return model.pipeline.vae
    try:
        return model.vae(vae.name)
    except ModelError as error:
        raise faults.failed_precondition("MODEL_UNUSABLE", f"vae.name: {error}", field="vae.name") from error


def _features(control: LoadedControl, condition: Image.Image) -> list[Tensor]:
    """What a T2I-Adapter makes of a condition, a tensor [1, channels, rows, columns] a block of the denoiser."""
    pixels = np.asarray(condition, dtype=np.float32) / 255
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    module: Any = control.module
    weight = next(module.parameters())
    made: list[Tensor] = module(torch.from_numpy(pixels.copy())[None].to(weight.device, weight.dtype))
    return made


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
