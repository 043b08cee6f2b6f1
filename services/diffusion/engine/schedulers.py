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

from services.diffusion.domain import Sampling
from services.diffusion.scheduler_table import SIGMA_SCHEDULES, TABLE, Family, SchedulerEntry

# What defines the noise a model was trained on. A class's own defaults must never stand in for these.
_TRAINING_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
# Pixel-space habits that some classes have by default and that ruin latents.
_LATENT_DEFAULTS = {"clip_sample": False, "thresholding": False}
# Pipelines of flow-matching models read these from the scheduler's config to shift its steps by the picture's size.
_SHIFT_KEYS = ("use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
_TRIAL_STEPS = (20, 60)
# The stand-in model of the trial errs by this much of the noise it sees, as real models do at best.
_TRIAL_DOUBT = 0.3
# Sound schedulers end within a few times that of the clean latents; a divergence shows as hundreds.
_TRIAL_ERROR_MOST = 5.0
# Noise schedules that the tests take every scheduler through, so that loading a model need not: that of the Stable
# Diffusion family and that of the embedded model, each with the classes that diverge on it. A trial of all schedulers
# takes some seconds.
_PROVEN_NOISE: tuple[tuple[dict[str, object], tuple[str, ...]], ...] = (
    ({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}, ()),
    ({"beta_start": 0.02, "beta_end": 0.0005, "beta_schedule": "linear"}, ("LMSDiscreteScheduler",)),
)
_DIVERGES = "it diverges on this model's noise schedule"
_PROVEN_ANYHOW = (
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
    "rescale_betas_zero_snr",
    "set_alpha_to_one",
    "clip_sample",
    "clip_sample_range",
)
_AS_IT_IS = Sampling()
_FAMILY_WORDS = {
    "noise": "noise prediction",
    "flow": "flow matching",
    "edm": "EDM's preconditioning",
}


def family_of(own: Any) -> Family:
    """What kind of model the scheduler is for."""
    name = own.__class__.__name__
    if (
        name.startswith("FlowMatch")
        or own.config.get("prediction_type") == "flow_prediction"
        or bool(own.config.get("use_flow_sigmas"))
    ):
        return "flow"
    return "edm" if name.startswith("EDM") else "noise"


def is_flow(own: Any) -> bool:
    """True if the scheduler is one of flow matching."""
    return family_of(own) == "flow"


def name_of(own: Any) -> str:
    """The table's name for the model's own scheduler; its class name if the table has none."""
    family = family_of(own)
    for entry in TABLE.values():
        if (
            entry.diffusers_class == own.__class__.__name__
            and entry.family == family
            and all(own.config.get(key) == value for key, value in entry.overrides.items())
        ):
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
    if entry.family != family_of(own):
        wanted = _FAMILY_WORDS[entry.family]
        raise ValueError(f"it is for models trained with {wanted}, and this one is not")
    overrides = {**entry.overrides, **_step_overrides(entry.diffusers_class, step_count)}
    if own.__class__.__name__ == entry.diffusers_class:
        return own.__class__.from_config(own.config, **overrides)
    cls = getattr(diffusers, entry.diffusers_class)
    if entry.flow:
        return _build_flow(cls, own.config, overrides)
    return cls.from_config(_translated(own.config, cls), **overrides)


class Schedulers:
    """The schedulers that can serve one model, ready to be handed out.

    own: the model's own scheduler. fit: names in the order of the table. unfit: the other names, and why not.
    """

    def __init__(self, own: Any) -> None:
        self._own = own
        self.default = name_of(own)
        self.unfit: dict[str, str] = {}
        self._fit: list[str] = []
        self._prototypes: dict[str, Any] = {}
        for name in dict.fromkeys([*TABLE, self.default]):
            reason = None if name == self.default else _verdict(name, own)
            if reason is None:
                self._fit.append(name)
            else:
                self.unfit[name] = reason

    @property
    def fit(self) -> tuple[str, ...]:
        """Names that the model can be painted with."""
        return tuple(self._fit)

    def make(self, name: str, step_count: int, sampling: Sampling = _AS_IT_IS) -> Any:
        """A scheduler for one picture, shared with nobody. Raises KeyError for a name that is not fit.

        step_count: before an image-to-image strength shortens them. sampling: what of it goes into the scheduler's
        config is applied; `services.diffusion.sampling.check` has found nothing wrong with it.
        """
        if name not in self._fit:
            raise KeyError(name)
        if name not in self._prototypes:
            self._prototypes[name] = build(name, self._own, max(_TRIAL_STEPS))
        prototype = self._prototypes[name]
        if _step_overrides(prototype.__class__.__name__, step_count):
            scheduler = build(name, self._own, step_count)
        else:
            scheduler = copy.deepcopy(prototype)  # some classes take half a second to construct
        # All of these are read when the timesteps are set or a step is done, not before.
        scheduler.register_to_config(**_sampling_overrides(sampling))
        if is_flow(scheduler):
            _take_what_flow_pipelines_pass(scheduler)
        start_at_first_step(scheduler)
        return scheduler


def pipeline_arguments(name: str, sampling: Sampling) -> dict[str, Any]:
    """What of `sampling` a pipeline's own call takes: eta, timesteps, sigmas; only what is set."""
    arguments: dict[str, Any] = {}
    if sampling.eta is not None:
        arguments["eta"] = sampling.eta
    if sampling.timesteps:
        arguments["timesteps"] = list(sampling.timesteps)
    if sampling.sigmas:
        sigmas = [sigma for sigma in sampling.sigmas if sigma != 0]
        # Of the classes that take sigmas only this one wants the end of the last step among them.
        end = [0.0] if TABLE[name].diffusers_class == "EulerDiscreteScheduler" else []
        arguments["sigmas"] = sigmas + end
    return arguments


def draw_from(scheduler: Any, generator: torch.Generator) -> None:
    """Let the scheduler's steps draw their noise from `generator` where the pipeline passes none.

    Pipelines of flow-matching models pass none; without this, stochastic schedulers would draw from torch's global
    generator, which all pictures share.
    """
    step = scheduler.step
    if "generator" not in inspect.signature(step).parameters:
        return

    @functools.wraps(step)
    def drawing(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("generator") is None:
            kwargs["generator"] = generator
        return step(*args, **kwargs)

    scheduler.step = drawing


def start_at_first_step(scheduler: Any) -> None:
    """Let the first step be the first, also where two neighbouring steps have the same rounded timestep.

    Schedulers find their place by the timestep and then take the second of two equal ones, which makes text-to-image
    run past the end, as on Karras spacing with zero terminal SNR. Image-to-image pipelines set the place themselves
    once they have the timesteps, which overrides this.
    """
    set_timesteps = scheduler.set_timesteps

    @functools.wraps(set_timesteps)
    def from_the_first(*args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)

    scheduler.set_timesteps = from_the_first


def place_of(scheduler: Any) -> int:
    """The index of the step that comes next, for schedulers that count them (those with `sigmas`)."""
    if scheduler.step_index is not None:
        return int(scheduler.step_index)
    return int(scheduler.begin_index or 0)  # nothing has been asked of it yet


def _take_what_flow_pipelines_pass(scheduler: Any) -> None:
    """Make every flow-matching scheduler take what only FlowMatchEuler has: sigmas, a shift, `scale_noise`.

    Flux passes evenly spaced sigmas of its own making and the shift `mu` whatever the scheduler, and image-to-image
    calls `scale_noise`; the classes below space their steps themselves and call the latter `add_noise`.
    """
    if not hasattr(scheduler, "scale_noise"):
        add_noise = scheduler.add_noise
        scheduler.scale_noise = lambda sample, timestep, noise: add_noise(sample, noise, timestep)
    set_timesteps = scheduler.set_timesteps
    if {"sigmas", "mu"} <= set(inspect.signature(set_timesteps).parameters):
        return

    def with_shift(
        num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, mu: float | None = None
    ) -> None:
        if mu is not None and scheduler.config.get("use_dynamic_shifting"):
            shift = mu if scheduler.config.get("time_shift_type") == "linear" else math.exp(mu)
            scheduler.register_to_config(**{_shift_key(type(scheduler)): shift})
        set_timesteps(len(sigmas) if num_inference_steps is None else num_inference_steps, device=device)

    scheduler.set_timesteps = with_shift


# What trials found, by name and the model's own scheduler.
_verdicts: dict[tuple[str, str], str | None] = {}


def _verdict(name: str, own: Any) -> str | None:
    """Why the scheduler of that name cannot serve the model, None if it can."""
    entry = TABLE[name]
    if entry.family == family_of(own) == "noise":
        for noise, diverging in _PROVEN_NOISE:
            if _is_proven(entry, own.config, noise):
                return _DIVERGES if entry.diffusers_class in diverging else None
    key = (name, f"{own.__class__.__name__} {sorted(own.config.items())}")
    if key not in _verdicts:
        try:
            _verdicts[key] = _why_unfit(build(name, own, max(_TRIAL_STEPS)))
        except ValueError as error:
            _verdicts[key] = str(error)
    return _verdicts[key]


def _is_proven(entry: SchedulerEntry, own: Mapping[str, Any], noise: Mapping[str, object]) -> bool:
    """Whether the model has this noise schedule, and nothing else that would make the scheduler behave otherwise."""
    known = inspect.signature(getattr(diffusers, entry.diffusers_class).__init__).parameters
    return all(own.get(key) == value for key, value in noise.items()) and all(
        key in (*noise, *_PROVEN_ANYHOW, *entry.overrides) or value == known[key].default
        for key, value in own.items()
        if key in known
    )


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
        return _DIVERGES
    return None


def _step_overrides(diffusers_class: str, step_count: int) -> dict[str, object]:
    # These two pick from a coarse grid, of 50 points by default, and refuse more steps than it has.
    if diffusers_class in ("LCMScheduler", "TCDScheduler"):
        return {"original_inference_steps": max(50, step_count)}
    return {}


def _sampling_overrides(sampling: Sampling) -> dict[str, object]:
    overrides: dict[str, object] = {}
    if sampling.sigma_schedule is not None:
        overrides.update({f"use_{known}_sigmas": known == sampling.sigma_schedule for known in SIGMA_SCHEDULES})
    if sampling.timestep_spacing is not None:
        overrides["timestep_spacing"] = sampling.timestep_spacing
    if sampling.prediction_type is not None:
        overrides["prediction_type"] = sampling.prediction_type
    return overrides


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


def _build_flow(cls: type[Any], own: Mapping[str, Any], overrides: dict[str, object]) -> Any:
    """A flow-matching scheduler of another class than the model's own, with the same shift of its steps."""
    known = inspect.signature(cls.__init__).parameters
    config = {key: value for key, value in own.items() if not key.startswith("_") and key in known}
    shift = own.get("shift", own.get("flow_shift", 1.0))
    # With a shift by the picture's size, the fixed one of the config counts for nothing.
    config[_shift_key(cls)] = 1.0 if own.get("use_dynamic_shifting") else shift
    scheduler = cls.from_config(config, **overrides)
    shifting = {key: own[key] for key in (*_SHIFT_KEYS, "time_shift_type") if key in own and key not in known}
    scheduler.register_to_config(**shifting)
    return scheduler


def _shift_key(cls: type[Any]) -> str:
    return "flow_shift" if "flow_shift" in inspect.signature(cls.__init__).parameters else "shift"


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
    set_timesteps = scheduler.set_timesteps
    shifted = scheduler.config.get("use_dynamic_shifting") and "mu" in inspect.signature(set_timesteps).parameters
    set_timesteps(step_count, **({"mu": 1.0} if shifted else {}))
    sample = torch.randn(shape, generator=generator) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if takes_generator else {}
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
        doubt = _TRIAL_DOUBT * _noise_share(scheduler, timestep)
        believed = clean + doubt * torch.randn(shape, generator=generator)
        output = _output_for(scheduler, seen, timestep, believed)
        sample = scheduler.step(output, timestep, sample, return_dict=False, **options)[0]
    error = float((sample - clean).abs().max())
    return error if math.isfinite(error) else math.inf


def _noise_share(scheduler: Any, timestep: Any) -> float:
    """How much of what the model sees is noise, 0 to 1."""
    family = family_of(scheduler)
    if family == "noise":
        return math.sqrt(1.0 - float(scheduler.alphas_cumprod[int(timestep)]))
    sigma = float(scheduler.sigmas[place_of(scheduler)])
    return sigma if family == "flow" else sigma / math.sqrt(sigma**2 + scheduler.config.sigma_data**2)


def _output_for(scheduler: Any, seen: torch.Tensor, timestep: Any, believed: torch.Tensor) -> torch.Tensor:
    """What a model that sees noisy latents and believes the clean ones to be `believed` would answer."""
    family = family_of(scheduler)
    if family == "flow":
        return (seen - believed) / float(scheduler.sigmas[place_of(scheduler)])
    if family == "edm":
        sigma = scheduler.sigmas[place_of(scheduler)]
        sample = seen / scheduler.precondition_inputs(torch.ones(()), sigma)
        skipped = scheduler.precondition_outputs(sample, torch.zeros_like(sample), sigma)
        scale = scheduler.precondition_outputs(torch.zeros(()), torch.ones(()), sigma)
        return torch.as_tensor((believed - skipped) / float(scale))
    alpha = max(float(scheduler.alphas_cumprod[int(timestep)]), 2**-24)
    signal, noise = math.sqrt(alpha), math.sqrt(1.0 - alpha)
    kind = scheduler.config.prediction_type
    if kind == "sample":
        return believed
    epsilon = (seen - signal * believed) / noise
    return epsilon if kind == "epsilon" else torch.as_tensor(signal * epsilon - noise * believed)
