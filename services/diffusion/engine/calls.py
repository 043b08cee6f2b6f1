"""One call inside the engine: its pictures, each in a lane of its own, kept in step with each other."""

import time
from typing import Any

import torch

from services.diffusion import metadata
from services.diffusion.domain import Painted, PaintJob, Parameters, PreviewPainted, StepDone
from services.diffusion.engine import lanes, previews
from services.diffusion.engine.models import LoadedModel
from services.diffusion.settings import Settings
from services.kit.faults import Fault, FaultData, Kind


class Picture:
    """One picture on its way: the pipeline's own call for it, inside a lane."""

    def __init__(self, model: LoadedModel, parameters: Parameters, job: PaintJob) -> None:
        self._parameters = parameters
        self._job = job
        self._pipeline = model.lane_pipeline(parameters.scheduler, parameters.step_count)
        self._known = model.call_parameters
        self.prediction = previews.Prediction(self._pipeline.scheduler)
        self.step = 0
        self.latents = torch.empty(0)  # as the last step left them
        self.lane = lanes.Lane(self._paint)

    def _paint(self) -> bytes:
        parameters = self._parameters
        arguments: dict[str, Any] = {
            "prompt": parameters.prompt,
            "negative_prompt": parameters.negative_prompt or None,
            "width": parameters.width,
            "height": parameters.height,
            "num_inference_steps": parameters.step_count,
            "guidance_scale": parameters.guidance_scale,
            # Drawn on the CPU whatever the hardware, so that a seed means the same noise everywhere.
            "generator": torch.Generator("cpu").manual_seed(parameters.seed),
            "output_type": "pt",
            "callback_on_step_end": self._on_step_end,
        }
        output = self._pipeline(**{key: value for key, value in arguments.items() if key in self._known})
        if any(getattr(output, "nsfw_content_detected", None) or ()):
            raise _spoilt("PICTURE_WITHHELD", "the model's own safety checker withheld the picture", parameters)
        pixels = output.images
        if not bool(torch.isfinite(pixels).all()):
            raise _spoilt("PICTURE_NOT_FINITE", "decoding gave values that are not numbers", parameters)
        if not bool(pixels.any()):
            raise _spoilt("PICTURE_BLACK", "every pixel came out black, the sign of a numeric failure", parameters)
        image = previews.to_image(pixels)
        return metadata.encode(image, parameters, self._job.media_type, self._job.quality)

    def _on_step_end(self, pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if not bool(torch.isfinite(tensors["latents"]).all()):
            raise _spoilt(
                "PICTURE_NOT_FINITE",
                f"the latents are not numbers any more after step {self.step + 1}",
                self._parameters,
            )
        self.latents = tensors["latents"]
        # Second-order schedulers evaluate the model twice a step, so count in proportion.
        count = len(pipeline.scheduler.timesteps)
        self.step = (index + 1) * self._parameters.step_count // count
        if index + 1 == count:
            lanes.pause()  # decoding is a turn of its own, so that a cancellation need not wait for it
        return {}


class Call:
    """The pictures of one call. They do each step together, so that progress and previews mean all of them."""

    def __init__(self, job: PaintJob, model: LoadedModel, settings: Settings) -> None:
        self.job = job
        self.model = model
        self._settings = settings
        self._pictures = [Picture(model, job.parameters_of(i), job) for i in range(job.image_count)]
        self._began: float | None = None
        self._reported_step = 0
        self._compute_s = 0.0

    @property
    def started(self) -> bool:
        """True once it had its first turn."""
        return self._began is not None

    @property
    def evaluations(self) -> int:
        """Denoiser evaluations so far, all pictures together."""
        return sum(picture.lane.evaluations for picture in self._pictures)

    def turn(self) -> list[StepDone | PreviewPainted | Painted]:
        """One turn for the picture that is furthest behind; answers what came of it, Painted last of all.

        Raises Fault if a picture is spoilt, and whatever else the pipeline raises.
        """
        began = time.monotonic()
        if self._began is None:
            self._began = began
        behind = min((p.lane for p in self._pictures if not p.lane.finished), key=lambda lane: lane.turns)
        behind.advance()
        self._compute_s += time.monotonic() - began
        said: list[StepDone | PreviewPainted | Painted] = []
        step = min(picture.step for picture in self._pictures)
        if step > self._reported_step:
            said.append(self._report(step))
            interval = self.job.preview_interval
            if self.model.preview is not None and interval and step // interval > self._reported_step // interval:
                said.append(self._preview(step))
            self._reported_step = step
        if all(picture.lane.finished for picture in self._pictures):
            said.append(Painted(tuple(picture.lane.result for picture in self._pictures), tuple(self._warnings())))
        return said

    def stop(self) -> None:
        """End every lane; no denoiser call of this job runs after this."""
        for picture in self._pictures:
            picture.lane.stop()

    def _report(self, step: int) -> StepDone:
        assert self._began is not None
        count = self.job.parameters.step_count
        elapsed_s = time.monotonic() - self._began
        compute_s, self._compute_s = self._compute_s, 0.0
        return StepDone(step, count, eta_ms=round(elapsed_s / step * (count - step) * 1000), compute_s=compute_s)

    def _preview(self, step: int) -> PreviewPainted:
        images = []
        for picture in self._pictures:
            latents = picture.prediction.clean_latents()
            if latents is None:
                latents = picture.latents
            images.append(
                previews.paint(
                    self.model.preview,
                    latents,
                    most_side=self._settings.preview_max_side_px,
                    quality=self._settings.preview_quality,
                )
            )
        return PreviewPainted(step, tuple(images))

    def _warnings(self) -> list[str]:
        parameters = self.job.parameters
        warnings = []
        for field in ("prompt", "negative_prompt"):
            if cut := self.model.cut_off(getattr(parameters, field)):
                limit = self.model.info.prompt_token_limit
                warnings.append(f"{field}: the model takes in {limit} tokens; it did not see the end: {cut!r}")
        if parameters.negative_prompt and parameters.guidance_scale <= 1:
            warnings.append(
                f"negative_prompt: it has no effect at guidance_scale {parameters.guidance_scale:g}; use more than 1"
            )
        return warnings


def _spoilt(reason: str, what: str, parameters: Parameters) -> Fault:
    message = (
        f"{what} (seed {parameters.seed}, scheduler {parameters.scheduler}, guidance_scale "
        f"{parameters.guidance_scale:g}); the same request will fail again: change one of these"
    )
    return Fault(FaultData(Kind.INTERNAL, reason, message, metadata={"seed": str(parameters.seed)}))
