"""The diffusion engine: a step machine that paints the calls it holds in turns, one denoiser evaluation a turn."""

import logging
from collections import deque

import diffusers
import msgspec
import torch
import transformers

from services.diffusion.domain import EngineInfo, Painted, PaintJob, Parameters
from services.diffusion.engine.calls import Call
from services.diffusion.engine.models import LoadedModel, choose_dtype
from services.diffusion.settings import Settings
from services.kit import faults
from services.kit.engine_api import Accepted, Cancelled, Failed, Finished, JobEvent, Raw, Update
from services.kit.faults import Fault
from services.runtimes.hardware import detect

log = logging.getLogger(__name__)


def create_engine(settings_json: str) -> "DiffusionEngine":
    """Load and warm the models of the table. Raises ModelError for one that cannot be served."""
    return DiffusionEngine(Settings.model_validate_json(settings_json))


class DiffusionEngine:
    """Implements services.kit.engine_api.Engine on diffusers pipelines.

    Every picture's denoiser evaluations keep the shape that they have when the picture is painted alone, which makes
    its bytes independent of whoever is painted in between (docs/decisions/0003-exact-bytes.md).
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # Pipelines switch autograd off and back on around themselves. Lanes interleave, so "back on" must be off too.
        torch.set_grad_enabled(False)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        # At their usual level these log the part of a prompt that was cut off, and prompts stay out of logs.
        diffusers.utils.logging.set_verbosity_error()
        transformers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        hardware = detect()
        dtype = choose_dtype(settings.dtype, hardware)
        self._models = {name: LoadedModel(name, row, hardware, dtype) for name, row in settings.models.items()}
        self._info = EngineInfo(
            hardware.label, f"torch {torch.__version__}", tuple(model.info for model in self._models.values())
        )
        # The next one to have a turn stands first.
        self._turns: deque[str] = deque()
        self._calls: dict[str, Call] = {}
        self._unsaid: list[JobEvent] = []
        for model in self._models.values():
            self._warm(model)

    def info(self) -> EngineInfo:
        """The loaded models and the hardware they run on."""
        return self._info

    @property
    def busy(self) -> bool:
        """True while there are calls to paint or events to tell."""
        return bool(self._calls or self._unsaid)

    def submit(self, job: str, payload: Raw) -> None:
        """Take in a PaintJob. Raises Fault for a model that is not loaded."""
        request = msgspec.msgpack.decode(payload, type=PaintJob)
        model = self._models.get(request.parameters.model)
        if model is None:
            raise faults.not_found("model", request.parameters.model, self._models, field="model")
        self._calls[job] = Call(request, model, self._settings)
        self._turns.append(job)

    def cancel(self, job: str) -> None:
        """Stop a job where it stands; no evaluation of its denoiser runs after this."""
        call = self._calls.get(job)
        if call is not None:
            call.stop()
            self._forget(job)
            self._unsaid.append(Cancelled(job))

    def step(self) -> list[JobEvent]:
        """One turn for the next call: at most one denoiser evaluation, or the decoding of one picture."""
        events, self._unsaid = self._unsaid, []
        if not self._turns:
            return events
        job = self._turns[0]
        self._turns.rotate(-1)
        call = self._calls[job]
        if not call.started:
            events.append(Accepted(job))
        try:
            said = call.turn()
        except Fault as fault:
            events.append(self._failed(job, call, fault))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            events.append(self._failed(job, call, _out_of_memory(call.job)))
        except Exception as error:  # noqa: BLE001 - a pipeline that fails on one call must not end the others
            # Without the error's own text, which may quote the prompt.
            log.error("painting failed with %s", type(error).__name__)
            where = f"{call.model.info.pipeline} failed with {type(error).__name__}"
            events.append(self._failed(job, call, faults.internal(where)))
        else:
            for item in said:
                if isinstance(item, Painted):
                    self._forget(job)
                    events.append(Finished(job, _raw(item)))
                else:
                    events.append(Update(job, _raw(item)))
        return events

    def evaluations(self, job: str) -> int:
        """Denoiser evaluations that a job under way has had."""
        return self._calls[job].evaluations

    def _failed(self, job: str, call: Call, fault: Fault) -> Failed:
        call.stop()
        self._forget(job)
        return Failed(job, fault.data)

    def _forget(self, job: str) -> None:
        del self._calls[job]
        self._turns.remove(job)

    def _warm(self, model: LoadedModel) -> None:
        """Paint one step, so that the first caller does not wait for lazy initialization, and a broken model shows."""
        info = model.info
        parameters = Parameters(
            model=info.name,
            prompt="warm-up",
            negative_prompt="",
            width=info.default_width,
            height=info.default_height,
            step_count=1,
            guidance_scale=info.default_guidance_scale,
            scheduler=info.default_scheduler,
            seed=0,
        )
        job = PaintJob(parameters, image_count=1, media_type="image/png", quality=95, preview_interval=1)
        call = Call(job, model, self._settings)
        try:
            while not any(isinstance(item, Painted) for item in call.turn()):
                pass
        except Fault as fault:
            # One step of a model that wants many may well come out black; its callers will be told.
            log.warning("warm-up of model %s: %s", info.name, fault.data.message)


def _raw(payload: msgspec.Struct) -> Raw:
    return Raw(msgspec.msgpack.encode(payload))


def _out_of_memory(job: PaintJob) -> Fault:
    width, height = job.parameters.width, job.parameters.height
    return faults.too_large(
        "width, height",
        "OUT_OF_MEMORY",
        f"{width}x{height} does not fit the memory of this hardware; ask for a smaller picture",
        width=width,
        height=height,
    )
