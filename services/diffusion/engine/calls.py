"""One call inside the engine: its pictures, each in a lane of its own, a batch of them kept in step with each other."""

import time
from collections.abc import Callable

from services.diffusion.domain import Painted, PaintJob, Parameters, PreviewPainted, StepDone
from services.diffusion.engine.models import LoadedModel
from services.diffusion.engine.picture import Picture, step_count
from services.diffusion.engine.previews import PreviewBudget
from services.diffusion.settings import Settings


class Call:
    """The pictures of one call. Those of a batch do each step together, so that progress and previews mean all of them.

    open_picture: makes a picture ready to be painted; raises Fault for one that cannot be.
    """

    def __init__(
        self, job: PaintJob, model: LoadedModel, open_picture: Callable[[Parameters], Picture], settings: Settings
    ) -> None:
        self.job = job
        self.model = model
        self._open = open_picture
        self._settings = settings
        self._waiting = list(job.pictures)
        self._steps_a_batch = step_count(job.parameters)
        self._step_count = self._steps_a_batch * (len(job.pictures) // job.batch_size)
        self._budget = PreviewBudget(job.preview.interval, self._step_count)
        self._batch: list[Picture] = []
        self._next_batch()
        self._painted: list[bytes] = []
        self._control_images: tuple[bytes, ...] = ()
        self._repaired = False
        self._evaluations = 0
        self._began: float | None = None
        self._reported_step = 0
        self._steps_before = 0
        self._compute_s = 0.0

    @property
    def started(self) -> bool:
        """True once it had its first turn."""
        return self._began is not None

    @property
    def evaluations(self) -> int:
        """Denoiser evaluations so far, all pictures together."""
        return self._evaluations + sum(picture.lane.evaluations for picture in self._batch)

    @property
    def phase(self) -> str:
        """What the next turn is for: "encode" the prompt and other inputs, "denoise", or "decode" the picture."""
        behind = self._furthest_behind()
        if behind.lane.turns == 0:
            return "encode"
        return "decode" if behind.step >= behind.step_count else "denoise"

    def turn(self) -> list[StepDone | PreviewPainted | Painted]:
        """One turn for the picture that is furthest behind; answers what came of it, Painted last of all.

        Raises Fault if a picture is spoilt, and whatever else the pipeline raises.
        """
        began = time.monotonic()
        if self._began is None:
            self._began = began
        self._furthest_behind().advance()
        self._compute_s += time.monotonic() - began
        said: list[StepDone | PreviewPainted | Painted] = []
        step = self._steps_before + min(picture.step for picture in self._batch)
        if step > self._reported_step:
            self._reported_step = step
            self._budget.note_steps(self._compute_s)
            said.append(self._report(step))
            said += self._preview(step)
        if all(picture.lane.finished for picture in self._batch):
            self._end_batch()
            if not self._waiting:
                said.append(Painted(tuple(self._painted), tuple(self._warnings()), self._control_images))
            else:
                self._next_batch()
        return said

    def stop(self) -> None:
        """End every lane; no denoiser call of this job runs after this."""
        for picture in self._batch:
            picture.stop()

    def _furthest_behind(self) -> Picture:
        going_on = (picture for picture in self._batch if not picture.lane.finished)
        return min(going_on, key=lambda picture: picture.lane.turns)

    def _next_batch(self) -> None:
        size = self.job.batch_size
        self._batch = [self._open(parameters) for parameters in self._waiting[:size]]
        del self._waiting[:size]

    def _end_batch(self) -> None:
        self._steps_before += self._steps_a_batch
        for picture in self._batch:
            self._painted.append(picture.lane.result)
            self._evaluations += picture.lane.evaluations
            self._repaired |= picture.repaired
            picture.stop()
        self._control_images = self._batch[0].control_images()
        self._batch = []

    def _report(self, step: int) -> StepDone:
        assert self._began is not None
        elapsed_s = time.monotonic() - self._began
        compute_s, self._compute_s = self._compute_s, 0.0
        left = self._step_count - step
        return StepDone(step, self._step_count, eta_ms=round(elapsed_s / step * left * 1000), compute_s=compute_s)

    def _preview(self, step: int) -> list[PreviewPainted]:
        plan, previews = self.job.preview, self.model.previews
        parameters = self.job.parameters
        expected_s = previews.expected_s(plan.method, parameters.width, parameters.height)
        if not self._budget.due(step, None if expected_s is None else expected_s * len(self._batch)):
            return []
        began = time.monotonic()
        images = []
        for picture in self._batch:
            latents = picture.preview_latents()
            if latents is not None:
                images.append(
                    previews.paint(
                        latents,
                        plan.method,
                        max_side_px=plan.max_side_px,
                        quality=self._settings.preview_quality,
                    )
                )
        self._budget.note_previews(time.monotonic() - began)
        # Between two passes of a picture there is nothing to show.
        return [PreviewPainted(step, tuple(images))] if len(images) == len(self._batch) else []

    def _warnings(self) -> list[str]:
        parameters = self.job.parameters
        warnings = self.model.conditioner.cut_off(parameters)
        if parameters.negative_prompt and (parameters.guidance_scale <= 1 or self.model.info.family == "flux"):
            why = (
                "on this kind of model"
                if self.model.info.family == "flux"
                else f"at guidance_scale {parameters.guidance_scale:g}; use more than 1"
            )
            warnings.append(f"negative_prompt: it has no effect {why}")
        if self._repaired:
            warnings.append(
                f"vae: decoding in {self.model.info.dtype} gave values that are not numbers and was done again in"
                " float32; set vae.upcast to do so at once"
            )
        return warnings
