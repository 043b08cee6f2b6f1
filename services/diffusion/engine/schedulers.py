"""Builds the schedulers of the table for a given model, and finds out which of them can serve it."""

import copy
import functools
import inspect
import math
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from services.diffusion.scheduler_table import TABLE

# What defines the noise a model was trained on. A class's own defaults must never stand in for these.
_TRAINING_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
# Pixel-space habits that some classes have by default and that ruin latents.
_LATENT_DEFAULTS = {"clip_sample": False, "thresholding": False}
_TRIAL_STEPS = (20, 100)
# The stand-in model of the trial sees the clean latents up to this much noise, as real models do at best.
_TRIAL_DOUBT = 0.3
# Sound schedulers end within a few times that of the clean latents; a divergence shows as hundreds.
_TRIAL_ERROR_MOST = 5.0


def is_flow(own: Any) -> bool:
    """True if the model's own scheduler is one of flow matching."""
    return (
        own.__class__.__name__.startswith("FlowMatch")
        or own.config.get("prediction_type") == "flow_prediction"
        or bool(own.config.get("use_flow_sigmas"))
    )


def name_of(own: Any) -> str:
    """The table's name for the model's own scheduler; its class name if the table has none."""
    of_class = [entry for entry in TABLE.values() if entry.diffusers_class == own.__class__.__name__]
    for entry in of_class:
        if all(own.config.get(key) == value for key, value in entry.overrides.items()):
            return entry.name
    return str(own.__class__.__name__)


def build(name: str, own: Any, step_count: int) -> Any:
    """A new scheduler instance of that name for a model whose own scheduler is `own`.

    name: from the table, or what `name_of` answers. Raises ValueError if the two do not go together.
    """
    entry = TABLE.get(name)
    if entry is None:
        if name != name_of(own):
            raise ValueError(f"{name} is not in the table")
        return own.__class__.from_config(own.config)
    if entry.flow != is_flow(own):
        wanted = "flow matching" if entry.flow else "noise prediction"
        raise ValueError(f"it is for models trained with {wanted}, and this one is not")
    if own.__class__.__name__ == entry.diffusers_class:
        return own.__class__.from_config(
            own.config, **entry.overrides, **_step_overrides(entry.diffusers_class, step_count)
        )
    cls = getattr(diffusers, entry.diffusers_class)
    return cls.from_config(
        _translated(own.config, cls), **entry.overrides, **_step_overrides(entry.diffusers_class, step_count)
    )


class Schedulers:
    """The schedulers that can serve one model, ready to be handed out.

    own: the model's own scheduler. fit: names in the order of the table. unfit: the other names, and why not.
    """

    def __init__(self, own: Any) -> None:
        self._own = own
        self.default = name_of(own)
        self.unfit: dict[str, str] = {}
        self._prototypes: dict[str, Any] = {}
        for name in dict.fromkeys([*TABLE, self.default]):
            try:
                prototype = build(name, own, max(_TRIAL_STEPS))
                reason = None if name == self.default else _why_unfit(prototype)
            except ValueError as error:
                reason = str(error)
            if reason is None:
                self._prototypes[name] = prototype
            else:
                self.unfit[name] = reason

    @property
    def fit(self) -> tuple[str, ...]:
        """Names that the model can be painted with."""
        return tuple(self._prototypes)

    def make(self, name: str, step_count: int) -> Any:
        """A scheduler for one picture, shared with nobody. Raises KeyError for a name that is not fit."""
        prototype = self._prototypes[name]
        if _step_overrides(prototype.__class__.__name__, step_count):
            scheduler = build(name, self._own, step_count)
        else:
            scheduler = copy.deepcopy(prototype)  # some classes take a third of a second to construct
        start_at_first_step(scheduler)
        return scheduler


def start_at_first_step(scheduler: Any) -> None:
    """Let the first step be the first, also where two neighbouring steps have the same rounded timestep.

    Schedulers find their place by the timestep and then take the second of two equal ones, which suits image-to-image
    but makes text-to-image run past the end, as on Karras spacing with zero terminal SNR.
    """
    set_timesteps = scheduler.set_timesteps

    @functools.wraps(set_timesteps)
    def from_the_first(*args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)

    scheduler.set_timesteps = from_the_first


def _why_unfit(scheduler: Any) -> str | None:
    """Why a scheduler cannot serve, None if it can. Takes it through its steps without the model."""
    start_at_first_step(scheduler)
    try:
        errors = [_trial(scheduler, step_count) for step_count in _TRIAL_STEPS]
    except Exception as error:  # noqa: BLE001 - the classes fail in many ways on configs they do not know
        return f"it fails on this model's noise schedule ({type(error).__name__}: {error})"
    finally:
        del scheduler.set_timesteps
    if not all(error < _TRIAL_ERROR_MOST for error in errors):
        return "it diverges on this model's noise schedule"
    return None


def _step_overrides(diffusers_class: str, step_count: int) -> dict[str, object]:
    # These two pick from a coarse grid, of 50 points by default, and refuse more steps than it has.
    if diffusers_class in ("LCMScheduler", "TCDScheduler"):
        return {"original_inference_steps": max(50, step_count)}
    return {}


def _translated(own: Mapping[str, Any], cls: type[Any]) -> dict[str, Any]:
    """The model's scheduler config, in terms that another scheduler class understands."""
    known = inspect.signature(cls.__init__).parameters
    defaulted = own.get("_use_default_values", [])
    config = {
        key: value
        for key, value in own.items()
        if not key.startswith("_") and key in known and (key not in defaulted or key in _TRAINING_KEYS)
    }
    config.update({key: value for key, value in _LATENT_DEFAULTS.items() if key in known})
    if own.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in known:
        if "trained_betas" not in known:
            raise ValueError("it cannot start from pure noise, as this model (zero terminal SNR) must")
        config["trained_betas"] = _zero_snr_betas(own)
    return config


def _zero_snr_betas(own: Mapping[str, Any]) -> list[float]:
    """The model's betas rescaled to zero terminal SNR, for classes that cannot do it themselves.

    The last cumulative alpha is kept just above 0, as diffusers' own sigma schedulers do, or the first sigma would be
    infinite.
    """
    plain = {key: own[key] for key in _TRAINING_KEYS if key in own}
    betas = rescale_zero_terminal_snr(diffusers.DDIMScheduler(**plain).betas)
    before_last = torch.cumprod(1.0 - betas, dim=0)[-2]
    betas[-1] = 1.0 - 2**-24 / before_last
    return [float(beta) for beta in betas]


def _trial(scheduler: Any, step_count: int) -> float:
    """Paint known latents with a stand-in model that nearly knows them; answers the largest error at the end."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, 4, 4, 4)
    clean = torch.randn(shape, generator=generator)
    scheduler.set_timesteps(step_count)
    sample = torch.randn(shape, generator=generator) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if takes_generator else {}
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
        believed = clean + _TRIAL_DOUBT * torch.randn(shape, generator=generator)
        output = _output_for(scheduler, seen, timestep, believed)
        sample = scheduler.step(output, timestep, sample, return_dict=False, **options)[0]
    error = float((sample - clean).abs().max())
    return error if math.isfinite(error) else math.inf


def _output_for(scheduler: Any, seen: torch.Tensor, timestep: Any, believed: torch.Tensor) -> torch.Tensor:
    """What a model that sees noisy latents and believes the clean ones to be `believed` would answer."""
    if is_flow(scheduler):
        sigma = float(timestep) / float(scheduler.config.num_train_timesteps)
        return (seen - believed) / sigma
    alpha = max(float(scheduler.alphas_cumprod[int(timestep)]), 2**-24)
    signal, noise = math.sqrt(alpha), math.sqrt(1.0 - alpha)
    kind = scheduler.config.prediction_type
    if kind == "sample":
        return believed
    epsilon = (seen - signal * believed) / noise
    return epsilon if kind == "epsilon" else signal * epsilon - noise * believed
