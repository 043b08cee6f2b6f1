"""The schedulers that Generate knows by name. Plain data: the front lists and checks them without diffusers.

What is not here and why: the torchsde ones (the package is unmaintained), the *Parallel and *Inverse ones (the same
pictures, or none), those of other kinds of models (consistency, unCLIP, token or video models), IPNDM (it ignores the
noise schedule a model was trained on), and DEIS and SA-Solver for flow matching, which diffusers ends with the last
step's noise left in the picture.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

# What a model was trained on: noise (or velocity) prediction, flow matching, or noise with EDM's preconditioning.
Family = Literal["noise", "flow", "edm"]

SIGMA_SCHEDULES = ("karras", "exponential", "beta")


@dataclass(frozen=True)
class SchedulerEntry:
    """One name of the table.

    aliases: other names that requests may use, whatever their case; the first is what the A1111 web UI calls it.
    overrides: what the name says about the scheduler's config; all else comes from the model's own scheduler config.
    """

    name: str
    diffusers_class: str
    aliases: tuple[str, ...]
    description: str
    overrides: dict[str, object] = field(default_factory=dict)
    family: Family = "noise"

    @property
    def flow(self) -> bool:
        """True for schedulers of flow-matching models."""
        return self.family == "flow"

    @property
    def sampling_options(self) -> tuple[str, ...]:
        """Fields of the Sampling message that it takes."""
        options = _OPTIONS.get((self.family, self.diffusers_class), ())
        if not any(self.overrides.get(f"use_{schedule}_sigmas") for schedule in SIGMA_SCHEDULES):
            return options
        # The name says how the noise levels are spread, so they cannot be given too.
        without = {"timesteps", "sigmas"} if self.spaces_sigmas else {"timesteps", "sigmas", "timestep_spacing"}
        return tuple(option for option in options if option not in without)

    @property
    def prediction_types(self) -> tuple[str, ...]:
        """What it can take a model's output for."""
        if "prediction_type" not in self.sampling_options:
            return ()
        known = ("epsilon", "v_prediction", "sample")
        return known[:2] if self.diffusers_class in _NO_SAMPLE_PREDICTION else known

    @property
    def spaces_sigmas(self) -> bool:
        """True if the timestep spacing still says something under a sigma schedule: where that begins and ends."""
        return self.diffusers_class in _SPACING_BOUNDS_SIGMAS


# Facts about diffusers' classes; a test holds them against the classes themselves.
_OPTIONS: dict[tuple[Family, str], tuple[str, ...]] = {
    ("noise", "DDIMScheduler"): ("timestep_spacing", "prediction_type", "eta"),
    ("noise", "DDPMScheduler"): ("timestep_spacing", "prediction_type", "timesteps"),
    ("noise", "PNDMScheduler"): ("timestep_spacing", "prediction_type"),
    ("noise", "LMSDiscreteScheduler"): ("sigma_schedule", "timestep_spacing", "prediction_type"),
    ("noise", "EulerDiscreteScheduler"): (
        "sigma_schedule",
        "timestep_spacing",
        "prediction_type",
        "timesteps",
        "sigmas",
    ),
    ("noise", "EulerAncestralDiscreteScheduler"): ("timestep_spacing", "prediction_type"),
    # Heun takes timesteps too, but then image-to-image pipelines miscount its two evaluations a step.
    ("noise", "HeunDiscreteScheduler"): ("sigma_schedule", "timestep_spacing", "prediction_type"),
    ("noise", "KDPM2DiscreteScheduler"): ("sigma_schedule", "timestep_spacing", "prediction_type"),
    ("noise", "KDPM2AncestralDiscreteScheduler"): ("sigma_schedule", "timestep_spacing", "prediction_type"),
    ("noise", "DPMSolverMultistepScheduler"): ("sigma_schedule", "timestep_spacing", "prediction_type", "timesteps"),
    ("noise", "DPMSolverSinglestepScheduler"): ("sigma_schedule", "prediction_type", "timesteps"),
    ("noise", "UniPCMultistepScheduler"): ("sigma_schedule", "timestep_spacing", "prediction_type"),
    ("noise", "DEISMultistepScheduler"): ("sigma_schedule", "timestep_spacing", "prediction_type"),
    ("noise", "SASolverScheduler"): ("sigma_schedule", "timestep_spacing", "prediction_type"),
    ("noise", "LCMScheduler"): ("prediction_type", "timesteps"),
    ("noise", "TCDScheduler"): ("prediction_type", "eta", "timesteps"),
    ("flow", "FlowMatchEulerDiscreteScheduler"): ("sigma_schedule", "sigmas"),
    ("flow", "FlowMatchLCMScheduler"): ("sigma_schedule", "sigmas"),
}
_NO_SAMPLE_PREDICTION = (
    "PNDMScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
)
_SPACING_BOUNDS_SIGMAS = (
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
)


def _sigmas(schedule: str | None = None, **more: object) -> dict[str, object]:
    return {**more, **{f"use_{known}_sigmas": known == schedule for known in SIGMA_SCHEDULES}}


def _solver(order: int, algorithm: str, schedule: str | None = None) -> dict[str, object]:
    return _sigmas(schedule, algorithm_type=algorithm, solver_order=order)


def _flow_solver(**more: object) -> dict[str, object]:
    return _sigmas(None, use_flow_sigmas=True, prediction_type="flow_prediction", **more)


_ENTRIES = (
    SchedulerEntry(
        "ddim",
        "DDIMScheduler",
        ("DDIM",),
        "Deterministic and plain; a safe choice from about 20 steps, and exact on models with zero terminal SNR.",
    ),
    SchedulerEntry(
        "ddpm",
        "DDPMScheduler",
        ("DDPM",),
        "The original sampler: adds noise at every step and wants many of them (100 or more).",
    ),
    SchedulerEntry(
        "pndm",
        "PNDMScheduler",
        ("PLMS", "PNDM"),
        "Pseudo linear multistep, the default of early Stable Diffusion; good from about 30 steps.",
        {"skip_prk_steps": True},
    ),
    SchedulerEntry(
        "lms",
        "LMSDiscreteScheduler",
        ("LMS", "LMSD"),
        "Linear multistep of fourth order; good from about 30 steps, less steady than dpmpp_2m below.",
        _sigmas(),
    ),
    SchedulerEntry(
        "lms_karras",
        "LMSDiscreteScheduler",
        ("LMS Karras",),
        "Linear multistep on Karras spacing; good from about 20 steps.",
        _sigmas("karras"),
    ),
    SchedulerEntry(
        "euler",
        "EulerDiscreteScheduler",
        ("Euler",),
        "First-order and deterministic; simple, quick and good from about 20 steps.",
        _sigmas(),
    ),
    SchedulerEntry(
        "euler_karras",
        "EulerDiscreteScheduler",
        ("Euler Karras",),
        "Euler on Karras spacing, which puts more of the steps where detail forms.",
        _sigmas("karras"),
    ),
    SchedulerEntry(
        "euler_ancestral",
        "EulerAncestralDiscreteScheduler",
        ("Euler a", "Euler Ancestral"),
        "Euler that adds fresh noise at every step; livelier, and never settles as steps grow.",
    ),
    SchedulerEntry(
        "heun",
        "HeunDiscreteScheduler",
        ("Heun",),
        "Second-order Euler: two model evaluations a step, so half the steps for the same time.",
        _sigmas(),
    ),
    SchedulerEntry(
        "heun_karras",
        "HeunDiscreteScheduler",
        ("Heun Karras",),
        "Heun on Karras spacing; two model evaluations a step.",
        _sigmas("karras"),
    ),
    SchedulerEntry(
        "dpmpp_2m",
        "DPMSolverMultistepScheduler",
        ("DPM++ 2M",),
        "DPM-Solver++ of second order; a good picture in 15 to 25 steps, and the usual recommendation.",
        _solver(2, "dpmsolver++"),
    ),
    SchedulerEntry(
        "dpmpp_2m_karras",
        "DPMSolverMultistepScheduler",
        ("DPM++ 2M Karras",),
        "DPM-Solver++ of second order on Karras spacing; favoured for detail at 20 to 30 steps.",
        _solver(2, "dpmsolver++", "karras"),
    ),
    SchedulerEntry(
        "dpmpp_2m_sde",
        "DPMSolverMultistepScheduler",
        ("DPM++ 2M SDE",),
        "The stochastic DPM-Solver++; richer texture than dpmpp_2m, from about 25 steps.",
        _solver(2, "sde-dpmsolver++"),
    ),
    SchedulerEntry(
        "dpmpp_2m_sde_karras",
        "DPMSolverMultistepScheduler",
        ("DPM++ 2M SDE Karras",),
        "The stochastic DPM-Solver++ on Karras spacing; rich texture at 25 to 40 steps.",
        _solver(2, "sde-dpmsolver++", "karras"),
    ),
    SchedulerEntry(
        "dpmpp_2m_sde_exponential",
        "DPMSolverMultistepScheduler",
        ("DPM++ 2M SDE Exponential",),
        "The stochastic DPM-Solver++ on exponential spacing; softer than with Karras spacing.",
        _solver(2, "sde-dpmsolver++", "exponential"),
    ),
    SchedulerEntry(
        "dpmpp_3m",
        "DPMSolverMultistepScheduler",
        ("DPM++ 3M",),
        "DPM-Solver++ of third order; for low guidance and 25 or more steps.",
        _solver(3, "dpmsolver++"),
    ),
    SchedulerEntry(
        "dpmpp_3m_sde",
        "DPMSolverMultistepScheduler",
        ("DPM++ 3M SDE",),
        "The stochastic DPM-Solver++ of third order; for low guidance and 30 or more steps.",
        _solver(3, "sde-dpmsolver++"),
    ),
    SchedulerEntry(
        "dpmpp_3m_sde_karras",
        "DPMSolverMultistepScheduler",
        ("DPM++ 3M SDE Karras",),
        "dpmpp_3m_sde on Karras spacing.",
        _solver(3, "sde-dpmsolver++", "karras"),
    ),
    SchedulerEntry(
        "dpmpp_3m_sde_exponential",
        "DPMSolverMultistepScheduler",
        ("DPM++ 3M SDE Exponential",),
        "dpmpp_3m_sde on exponential spacing.",
        _solver(3, "sde-dpmsolver++", "exponential"),
    ),
    SchedulerEntry(
        "dpmpp_2s",
        "DPMSolverSinglestepScheduler",
        ("DPM++ 2S",),
        "The single-step form of DPM-Solver++; steadier than dpmpp_2m when guidance is strong.",
        _solver(2, "dpmsolver++"),
    ),
    SchedulerEntry(
        "dpmpp_2s_karras",
        "DPMSolverSinglestepScheduler",
        ("DPM++ 2S Karras",),
        "dpmpp_2s on Karras spacing.",
        _solver(2, "dpmsolver++", "karras"),
    ),
    SchedulerEntry(
        "dpmpp_sde",
        "DPMSolverSinglestepScheduler",
        ("DPM++ SDE",),
        "The stochastic single-step DPM-Solver++; strong detail from about 15 steps.",
        _solver(2, "sde-dpmsolver++"),
    ),
    SchedulerEntry(
        "dpmpp_sde_karras",
        "DPMSolverSinglestepScheduler",
        ("DPM++ SDE Karras",),
        "The stochastic single-step DPM-Solver++ on Karras spacing; strong detail from about 10 steps.",
        _solver(2, "sde-dpmsolver++", "karras"),
    ),
    SchedulerEntry(
        "unipc",
        "UniPCMultistepScheduler",
        ("UniPC",),
        "Predictor and corrector in one; among the best at 5 to 15 steps.",
        _sigmas(),
    ),
    SchedulerEntry(
        "deis",
        "DEISMultistepScheduler",
        ("DEIS",),
        "Exponential integrator; close to dpmpp_2m, good at 10 to 20 steps.",
        _sigmas(),
    ),
    SchedulerEntry(
        "sa_solver",
        "SASolverScheduler",
        ("SA Solver", "SA-Solver"),
        "Stochastic Adams predictor and corrector: adds noise in the middle of the way; from about 20 steps.",
        _sigmas(),
    ),
    SchedulerEntry(
        "kdpm2",
        "KDPM2DiscreteScheduler",
        ("DPM2", "KDPM2"),
        "DPM-Solver of second order after Karras: two model evaluations a step, sharp.",
        _sigmas(),
    ),
    SchedulerEntry(
        "kdpm2_karras",
        "KDPM2DiscreteScheduler",
        ("DPM2 Karras",),
        "kdpm2 on Karras spacing; two model evaluations a step.",
        _sigmas("karras"),
    ),
    SchedulerEntry(
        "kdpm2_ancestral",
        "KDPM2AncestralDiscreteScheduler",
        ("DPM2 a", "KDPM2 a"),
        "kdpm2 with fresh noise at every step; two model evaluations a step.",
        _sigmas(),
    ),
    SchedulerEntry(
        "kdpm2_ancestral_karras",
        "KDPM2AncestralDiscreteScheduler",
        ("DPM2 a Karras",),
        "kdpm2_ancestral on Karras spacing; two model evaluations a step.",
        _sigmas("karras"),
    ),
    SchedulerEntry(
        "lcm",
        "LCMScheduler",
        ("LCM",),
        "For latent consistency models: 2 to 8 steps, guidance 1 to 2; blurred on other models.",
    ),
    SchedulerEntry(
        "tcd",
        "TCDScheduler",
        ("TCD",),
        "For trajectory consistency models: 4 to 8 steps with sharper detail than lcm.",
    ),
    SchedulerEntry(
        "edm_euler",
        "EDMEulerScheduler",
        ("Euler EDM",),
        "First-order and deterministic, for models trained with EDM's preconditioning such as Playground 2.5.",
        family="edm",
    ),
    SchedulerEntry(
        "edm_dpmpp_2m",
        "EDMDPMSolverMultistepScheduler",
        ("DPM++ 2M EDM",),
        "DPM-Solver++ of second order, for models trained with EDM's preconditioning.",
        {"algorithm_type": "dpmsolver++", "solver_order": 2},
        family="edm",
    ),
    SchedulerEntry(
        "flow_euler",
        "FlowMatchEulerDiscreteScheduler",
        ("Euler", "Euler FlowMatch"),
        "First-order and deterministic, for flow-matching models such as Stable Diffusion 3 and Flux.",
        family="flow",
    ),
    SchedulerEntry(
        "flow_heun",
        "FlowMatchHeunDiscreteScheduler",
        ("Heun", "Heun FlowMatch"),
        "Second-order Euler for flow-matching models: two model evaluations a step.",
        family="flow",
    ),
    SchedulerEntry(
        "flow_lcm",
        "FlowMatchLCMScheduler",
        ("LCM", "LCM FlowMatch"),
        "For flow-matching models distilled to few steps: starts each step from fresh noise.",
        family="flow",
    ),
    SchedulerEntry(
        "flow_dpmpp_2m",
        "DPMSolverMultistepScheduler",
        ("DPM++ 2M", "DPM++ 2M FlowMatch"),
        "DPM-Solver++ of second order for flow-matching models; sharper than flow_euler at 15 to 25 steps.",
        _flow_solver(algorithm_type="dpmsolver++", solver_order=2),
        family="flow",
    ),
    SchedulerEntry(
        "flow_dpmpp_2m_sde",
        "DPMSolverMultistepScheduler",
        ("DPM++ 2M SDE", "DPM++ 2M SDE FlowMatch"),
        "The stochastic DPM-Solver++ for flow-matching models; from about 25 steps.",
        _flow_solver(algorithm_type="sde-dpmsolver++", solver_order=2),
        family="flow",
    ),
    SchedulerEntry(
        "flow_dpmpp_2s",
        "DPMSolverSinglestepScheduler",
        ("DPM++ 2S", "DPM++ 2S FlowMatch"),
        "The single-step form of DPM-Solver++ for flow-matching models.",
        _flow_solver(algorithm_type="dpmsolver++", solver_order=2),
        family="flow",
    ),
    SchedulerEntry(
        "flow_unipc",
        "UniPCMultistepScheduler",
        ("UniPC", "UniPC FlowMatch"),
        "Predictor and corrector in one for flow-matching models; good at 8 to 20 steps.",
        _flow_solver(),
        family="flow",
    ),
)

TABLE: dict[str, SchedulerEntry] = {entry.name: entry for entry in _ENTRIES}


def resolve(name: str, fit: Collection[str] = ()) -> str | None:
    """The table's name for what a request calls a scheduler; None if nothing goes by that name.

    A name of the table, or of `fit`, means itself. Else an alias or a diffusers class, whatever its case: several
    entries may share it ("Euler" is euler or flow_euler), and then the first in `fit` is meant, the names that the
    model can be painted with.
    """
    if name in TABLE or name in fit:
        return name
    meant = _BY_NAME.get(_folded(name), ())
    return next((known for known in meant if known in fit), meant[0] if meant else None)


def _folded(name: str) -> str:
    return " ".join(name.casefold().split())


def _by_name() -> dict[str, tuple[str, ...]]:
    found: dict[str, dict[str, None]] = {}
    classes: set[tuple[Family, str]] = set()
    for entry in _ENTRIES:
        names = [entry.name, *entry.aliases]
        if (entry.family, entry.diffusers_class) not in classes:  # the first of a class is its plain form
            classes.add((entry.family, entry.diffusers_class))
            names.append(entry.diffusers_class)
        for name in names:
            found.setdefault(_folded(name), {})[entry.name] = None
    return {name: tuple(entries) for name, entries in found.items()}


_BY_NAME = _by_name()
