"""The diffusion engine: a step machine that paints the calls it holds in turns, one denoiser evaluation a turn."""

import logging
from collections import deque
from collections.abc import Callable
from weakref import WeakKeyDictionary, WeakSet

import diffusers
import msgspec
import torch
import transformers

from services.diffusion.domain import (
    EngineInfo,
    LoadJob,
    Painted,
    PaintJob,
    Parameters,
    PreviewPlan,
    StepDone,
    UnloadJob,
    Work,
)
from services.diffusion.engine import preprocessors
from services.diffusion.engine.adapters import Adapters, Held
from services.diffusion.engine.calls import Call
from services.diffusion.engine.layers import Layers
from services.diffusion.engine.models import LoadedModel, choose_dtype
from services.diffusion.engine.picture import Picture
from services.diffusion.engine.shelf import Shelf
from services.diffusion.settings import MEMORY_SHARE, Settings
from services.kit import faults, phases
from services.kit.engine_api import Accepted, Cancelled, EngineEvent, Failed, Finished, Raw, Update, at_end
from services.kit.faults import Fault
from services.runtimes import tuning
from services.runtimes.artifacts import leases
from services.runtimes.diffusion_sources import ModelError
from services.runtimes.hardware import detect, free_memory

log = logging.getLogger(__name__)

_work: msgspec.msgpack.Decoder[Work] = msgspec.msgpack.Decoder(Work)


def create_engine(settings_json: str) -> "DiffusionEngine":
    """Load and warm the models that are wanted at the start. Raises ModelError for one that cannot be served."""
    return DiffusionEngine(Settings.model_validate_json(settings_json))


class DiffusionEngine:
    """Implements services.kit.engine_api.BackgroundEngine on diffusers pipelines.

    shelf: the models in memory.

    Everything runs in inference mode, which pipelines do not ask for: without the book-keeping of views and versions a
    denoiser of some 20 ms is 7 % faster, and computes the same bits.

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
        at_end(leases.end_all)
        hardware = detect()
        tuning.start(hardware, settings.torch_compile)
        dtype = choose_dtype(settings.dtype, hardware)
        limit = settings.memory_limit_bytes or int(MEMORY_SHARE * free_memory(hardware.device))
        self.shelf = Shelf(settings, hardware, dtype, limit, self._warm)
        # The next one to have a turn stands first.
        self._turns: deque[str] = deque()
        self._calls: dict[str, Call] = {}
        self._adapters: WeakKeyDictionary[LoadedModel, Adapters] = WeakKeyDictionary()
        self._held: WeakSet[Held] = WeakSet()  # by all pictures under way
        self._preprocessor_models = preprocessors.Models(settings, torch.device(hardware.device))
        self._unsaid: list[EngineEvent] = []
        self.shelf.load_at_start()

    def on_wake(self, wake: Callable[[], None]) -> None:
        """`wake` is called when a model that is being loaded has come a step further."""
        self.shelf.wake = wake

    def info(self) -> EngineInfo:
        """The loaded models and the hardware they run on."""
        return self.shelf.info()

    @property
    def busy(self) -> bool:
        """True while there are calls to paint or events to tell; loading is no work of this thread."""
        return bool(self._calls or self._unsaid) or self.shelf.busy

    @torch.inference_mode()
    def submit(self, job: str, payload: Raw) -> None:
        """Take in a Work. Raises Fault for a model that is not known."""
        match _work.decode(payload):
            case PaintJob() as work:
                models = self.shelf.take(job, work)
                if models is not None:
                    self._begin(job, work, models)
            case LoadJob() as work:
                self.shelf.load(job, work)
            case UnloadJob() as work:
                self.shelf.unload(job, work)

    @torch.inference_mode()
    def cancel(self, job: str) -> None:
        """Stop a job where it stands; no evaluation of its denoiser runs after this."""
        call = self._calls.get(job)
        if call is not None:
            call.stop()
            self._forget(job)
            self._unsaid.append(Cancelled(job))
        elif self.shelf.cancel(job):
            self._unsaid.append(Cancelled(job))

    @torch.inference_mode()
    def step(self) -> list[EngineEvent]:
        """One turn for the next call: at most one denoiser evaluation, or the decoding of one picture."""
        self.shelf.advance()
        events = [*self.shelf.take_events(), *self._unsaid]
        self._unsaid = []
        for job, work, models in self.shelf.arrived():
            try:
                self._begin(job, work, models)
            except Fault as fault:
                events.append(Failed(job, fault.data))
        if not self._turns:
            return events
        job = self._turns[0]
        self._turns.rotate(-1)
        call = self._calls[job]
        if not call.started:
            events.append(Accepted(job))
        if phases.followed(job):
            phases.enter(job, call.phase, batch_size=call.job.batch_size)
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
                    if isinstance(item, StepDone):
                        phases.step(job, number=item.step, compute_s=item.compute_s)
                    events.append(Update(job, _raw(item)))
        return events

    def evaluations(self, job: str) -> int:
        """Denoiser evaluations that a job under way has had."""
        return self._calls[job].evaluations

    def _begin(self, job: str, work: PaintJob, models: dict[str, LoadedModel]) -> None:
        """Let a call whose models are there have turns. Raises Fault for one that they cannot serve."""
        try:
            self._calls[job] = self._open(work, models, self._held)
        except BaseException:
            self.shelf.release(job)
            raise
        self._turns.append(job)

    def _open(self, work: PaintJob, models: dict[str, LoadedModel], held: WeakSet[Held]) -> Call:
        """The call, its first batch ready to be painted. held: by the pictures under way. Raises Fault."""
        model = models[work.parameters.model]
        refiner = work.parameters.refiner
        takes_over = models[refiner.model] if refiner is not None else None

        def open_picture(parameters: Parameters) -> Picture:
            layers = Layers(
                model,
                self._adapters_of(model),
                takes_over,
                parameters,
                work,
                self._preprocessor_models,
                under_way=list(held),
            )
            held.add(layers.held)
            return Picture(model, takes_over, parameters, work, layers)

        return Call(work, model, open_picture, self._settings)

    def _adapters_of(self, model: LoadedModel) -> Adapters:
        adapters = self._adapters.get(model)
        if adapters is None:
            adapters = self._adapters[model] = Adapters(model, self._settings)
        return adapters

    def _failed(self, job: str, call: Call, fault: Fault) -> Failed:
        call.stop()
        self._forget(job)
        return Failed(job, fault.data)

    def _forget(self, job: str) -> None:
        del self._calls[job]
        self._turns.remove(job)
        self.shelf.release(job)

    def _warm(self, model: LoadedModel) -> None:
        """Paint one step, so that the first caller does not wait for lazy initialization, and a broken model shows.

        May run on any thread while others paint. Raises ModelError for a model that cannot paint.
        """
        info = model.info
        if "text" not in info.features:
            return  # it only finishes what another begins
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
        job = PaintJob((parameters,), batch_size=1, media_type="image/png", quality=95, preview=PreviewPlan(interval=0))
        call = self._open(job, {info.name: model}, WeakSet())  # the model is nobody's yet
        try:
            while not any(isinstance(item, Painted) for item in call.turn()):
                pass
            self._learn_preview_cost(model)
        except Fault as fault:
            # One step of a model that wants many may well come out black; its callers will be told.
            log.warning("warm-up of model %s: %s", info.name, fault.data.message)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # parts that load each by itself need not fit each other
            raise ModelError(f"model {info.name}: it fails on a first picture: {error}") from error
        finally:
            call.stop()

    def _learn_preview_cost(self, model: LoadedModel) -> None:
        """Paint previews of nothing: the first is slow, and a call's budget is to know what the others cost."""
        factor = model.pipeline.vae_scale_factor
        shape = (1, model.pipeline.vae.config.latent_channels)
        latents = torch.zeros(*shape, model.info.default_height // factor, model.info.default_width // factor)
        for _ in range(3):
            model.previews.paint(
                latents, None, max_side_px=self._settings.preview_max_side_px, quality=self._settings.preview_quality
            )


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
