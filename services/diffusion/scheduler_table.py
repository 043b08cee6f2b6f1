"""The schedulers that Generate knows by name. Plain data: the front lists them without diffusers."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SchedulerEntry:
    """One name of the table.

    overrides: what the name says about the scheduler's config; all else comes from the model's own scheduler config.
    flow: True for schedulers of flow-matching models, False for those of noise-predicting ones.
    """

    name: str
    diffusers_class: str
    description: str
    overrides: dict[str, object] = field(default_factory=dict)
    flow: bool = False


def _multistep(order: int, algorithm: str, karras: bool) -> dict[str, object]:
    return {"algorithm_type": algorithm, "solver_order": order, "use_karras_sigmas": karras}


_ENTRIES = (
    SchedulerEntry(
        "ddim",
        "DDIMScheduler",
        "Deterministic and plain; a safe choice from about 20 steps, and exact on models with zero terminal SNR.",
    ),
    SchedulerEntry(
        "ddpm",
        "DDPMScheduler",
        "The original sampler: adds noise at every step and wants many of them (100 or more).",
    ),
    SchedulerEntry(
        "pndm",
        "PNDMScheduler",
        "Pseudo linear multistep, the default of early Stable Diffusion; good from about 30 steps.",
        {"skip_prk_steps": True},
    ),
    SchedulerEntry(
        "euler",
        "EulerDiscreteScheduler",
        "First-order and deterministic; simple, quick and good from about 20 steps.",
        {"use_karras_sigmas": False},
    ),
    SchedulerEntry(
        "euler_karras",
        "EulerDiscreteScheduler",
        "Euler on Karras spacing, which puts more of the steps where detail forms.",
        {"use_karras_sigmas": True},
    ),
    SchedulerEntry(
        "euler_ancestral",
        "EulerAncestralDiscreteScheduler",
        "Euler that adds fresh noise at every step; livelier, and never settles as steps grow.",
    ),
    SchedulerEntry(
        "heun",
        "HeunDiscreteScheduler",
        "Second-order Euler: two model evaluations a step, so half the steps for the same time.",
        {"use_karras_sigmas": False},
    ),
    SchedulerEntry(
        "dpmpp_2m",
        "DPMSolverMultistepScheduler",
        "DPM-Solver++ of second order; a good picture in 15 to 25 steps, and the usual recommendation.",
        _multistep(2, "dpmsolver++", False),
    ),
    SchedulerEntry(
        "dpmpp_2m_karras",
        "DPMSolverMultistepScheduler",
        "DPM-Solver++ of second order on Karras spacing; favoured for detail at 20 to 30 steps.",
        _multistep(2, "dpmsolver++", True),
    ),
    SchedulerEntry(
        "dpmpp_2m_sde",
        "DPMSolverMultistepScheduler",
        "The stochastic DPM-Solver++; richer texture than dpmpp_2m, from about 25 steps.",
        _multistep(2, "sde-dpmsolver++", False),
    ),
    SchedulerEntry(
        "dpmpp_2m_sde_karras",
        "DPMSolverMultistepScheduler",
        "The stochastic DPM-Solver++ on Karras spacing; rich texture at 25 to 40 steps.",
        _multistep(2, "sde-dpmsolver++", True),
    ),
    SchedulerEntry(
        "dpmpp_3m",
        "DPMSolverMultistepScheduler",
        "DPM-Solver++ of third order; for low guidance and 25 or more steps.",
        _multistep(3, "dpmsolver++", False),
    ),
    SchedulerEntry(
        "dpmpp_2s",
        "DPMSolverSinglestepScheduler",
        "The single-step form of DPM-Solver++; steadier than dpmpp_2m when guidance is strong.",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": False},
    ),
    SchedulerEntry(
        "unipc",
        "UniPCMultistepScheduler",
        "Predictor and corrector in one; among the best at 5 to 15 steps.",
        {"use_karras_sigmas": False},
    ),
    SchedulerEntry(
        "deis",
        "DEISMultistepScheduler",
        "Exponential integrator; close to dpmpp_2m, good at 10 to 20 steps.",
        {"use_karras_sigmas": False},
    ),
    SchedulerEntry(
        "kdpm2",
        "KDPM2DiscreteScheduler",
        "DPM-Solver of second order after Karras: two model evaluations a step, sharp.",
        {"use_karras_sigmas": False},
    ),
    SchedulerEntry(
        "kdpm2_ancestral",
        "KDPM2AncestralDiscreteScheduler",
        "kdpm2 with fresh noise at every step; two model evaluations a step.",
        {"use_karras_sigmas": False},
    ),
    SchedulerEntry(
        "lcm",
        "LCMScheduler",
        "For latent consistency models: 2 to 8 steps, guidance 1 to 2; blurred on other models.",
    ),
    SchedulerEntry(
        "tcd",
        "TCDScheduler",
        "For trajectory consistency models: 4 to 8 steps with sharper detail than lcm.",
    ),
    SchedulerEntry(
        "flow_euler",
        "FlowMatchEulerDiscreteScheduler",
        "First-order and deterministic, for flow-matching models such as Stable Diffusion 3 and Flux.",
        flow=True,
    ),
)

TABLE: dict[str, SchedulerEntry] = {entry.name: entry for entry in _ENTRIES}
