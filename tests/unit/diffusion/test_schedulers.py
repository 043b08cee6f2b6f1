"""Every scheduler of the table, on the noise schedules that models come with."""

import functools
import inspect
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from services.diffusion import metadata
from services.diffusion.engine import schedulers
from services.diffusion.engine.previews import Prediction
from services.diffusion.scheduler_table import TABLE
from tests.support import tiny_diffusion
from tests.unit.diffusion.conftest import Driver, paint_job

# diffusers' KDPM2 classes use numpy in ways that it will give up.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PLAIN = DDIMScheduler(clip_sample=False, **tiny_diffusion.PLAIN)
ZERO_SNR = DDIMScheduler(clip_sample=False, **tiny_diffusion.ZERO_SNR)
FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)
NOISE_NAMES = [name for name, entry in TABLE.items() if not entry.flow]


@functools.cache
def served(kind: str) -> schedulers.Schedulers:
    return schedulers.Schedulers({"plain": PLAIN, "zero-snr": ZERO_SNR, "flow": FLOW}[kind])


class Oracle:
    """Stands in for a perfect model: it knows the clean latents and predicts the noise or velocity exactly."""

    def __init__(self, scheduler: Any, clean: torch.Tensor) -> None:
        self._kind = scheduler.config.prediction_type
        self._clean = clean

    def __call__(self, scaled: torch.Tensor, alpha: float) -> Any:
        noise = (scaled - alpha**0.5 * self._clean) / (1 - alpha) ** 0.5
        if self._kind == "epsilon":
            return noise
        return alpha**0.5 * noise - (1 - alpha) ** 0.5 * self._clean


@pytest.mark.parametrize("name", TABLE)
def test_the_table_describes_what_diffusers_has(name: str) -> None:
    entry = TABLE[name]
    known = inspect.signature(getattr(diffusers, entry.diffusers_class).__init__).parameters
    assert set(entry.overrides) <= set(known)
    assert entry.description.endswith(".")
    assert metadata._SAMPLER_NAMES[name]


def test_which_fit_which_model() -> None:
    assert set(served("plain").fit) == set(NOISE_NAMES)
    assert set(served("zero-snr").fit) == set(NOISE_NAMES)
    assert set(served("flow").fit) == {"flow_euler"}
    assert "trained with flow matching" in served("plain").unfit["flow_euler"]
    assert "trained with noise prediction" in served("flow").unfit["ddim"]


def test_one_that_diverges_is_found_out_without_the_model() -> None:
    wild = schedulers.build("euler", PLAIN, 20)
    step = wild.step
    wild.step = lambda output, timestep, sample, **options: (step(output, timestep, sample, **options)[0] * 10,)
    assert schedulers._why_unfit(wild) == "it diverges on this model's noise schedule"
    broken = schedulers.build("euler", PLAIN, 20)
    broken.scale_model_input = lambda sample, timestep: sample[99]
    assert "IndexError" in (schedulers._why_unfit(broken) or "")


@pytest.mark.parametrize("name", ["dpmpp_2m_karras", "dpmpp_2m_sde_karras", "dpmpp_3m"])
def test_steps_whose_timesteps_round_alike_are_all_taken(name: str) -> None:
    """Near pure noise many steps of a Karras spacing share the timestep 999."""
    scheduler = served("zero-snr").make(name, 150)
    scheduler.set_timesteps(150)
    sample = torch.zeros(1, 1, 1, 1)
    for timestep in scheduler.timesteps:
        sample = scheduler.step(sample, timestep, sample, return_dict=False)[0]
    assert scheduler.step_index == 150


@pytest.mark.parametrize("name", NOISE_NAMES)
@pytest.mark.parametrize("model", ["plain", "zero-snr"])
def test_each_that_fits_paints(driver: Driver, model: str, name: str) -> None:
    info = driver.engine.info().model(model)
    assert info is not None
    assert name in info.schedulers
    for step_count in (1, 5):
        painted = driver.paint(paint_job(model=model, scheduler=name, step_count=step_count))
        assert metadata.read(painted.images[0])[0].scheduler == name


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m", "dpmpp_2s", "unipc", "deis", "pndm"])
@pytest.mark.parametrize("own", [PLAIN, ZERO_SNR], ids=["plain", "zero-snr"])
def test_a_perfect_model_is_followed_to_its_picture(name: str, own: Any) -> None:
    clean = torch.linspace(-1, 1, 64).reshape(1, 4, 4, 4)
    scheduler = schedulers.build(name, own, 20)
    scheduler.set_timesteps(20)
    model = Oracle(scheduler, clean)
    sample = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)) * float(scheduler.init_noise_sigma)
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(sample, timestep)
        alpha = max(float(scheduler.alphas_cumprod[int(timestep)]), 2**-24)
        sample = scheduler.step(model(scaled, alpha), timestep, sample, return_dict=False)[0]
    assert float((sample - clean).abs().max()) < 0.1


@pytest.mark.parametrize("kind", ["plain", "zero-snr", "flow"])
def test_previews_show_what_the_model_believes(kind: str) -> None:
    """From a perfect model's answers the clean latents come out at every step, whatever the scheduler."""
    clean = torch.linspace(-1, 1, 64).reshape(1, 4, 4, 4)
    for name in served(kind).fit:
        scheduler = served(kind).make(name, 12)
        prediction = Prediction(scheduler)
        assert prediction.clean_latents() is None
        scheduler.set_timesteps(12)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        sample = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
        for timestep in scheduler.timesteps:
            seen = scheduler.scale_model_input(sample, timestep) if kind != "flow" else sample
            sample = scheduler.step(
                schedulers._output_for(scheduler, seen, timestep, clean), timestep, sample, return_dict=False
            )[0]
            believed = prediction.clean_latents()
            assert believed is not None
            # Schedulers round timesteps, and around pure noise a rounded timestep is a different noise level.
            assert float((believed - clean).abs().mean()) < 0.2, (name, timestep)


def test_a_sigma_scheduler_starts_where_a_zero_snr_model_was_trained_to_start() -> None:
    """Classes that know nothing of zero terminal SNR get the rescaled noise schedule all the same."""
    ours = schedulers.build("deis", ZERO_SNR, 10)
    theirs = DPMSolverMultistepScheduler.from_config(ZERO_SNR.config)
    assert ours.alphas_cumprod[-1] == pytest.approx(float(theirs.alphas_cumprod[-1]), rel=0.05)
    assert torch.allclose(ours.alphas_cumprod[:-1], theirs.alphas_cumprod[:-1], rtol=1e-3)


def test_the_models_own_scheduler_is_taken_as_it_is() -> None:
    own = DDIMScheduler(**tiny_diffusion.PLAIN, clip_sample=True, clip_sample_range=3.0)
    assert schedulers.name_of(own) == "ddim"
    assert dict(schedulers.build("ddim", own, 20).config) == dict(own.config)
    # Another class must not clip latents just because its own default is to.
    assert schedulers.build("lcm", own, 20).config.clip_sample is False


@pytest.mark.parametrize("name", NOISE_NAMES)
def test_names_survive_being_a_models_own(name: str) -> None:
    own = schedulers.build(name, PLAIN, 20)
    assert schedulers.name_of(own) == name


def test_one_that_the_table_lacks_keeps_its_class_name() -> None:
    own = diffusers.EulerDiscreteScheduler.from_config(PLAIN.config)
    own.__class__ = type("HomeMadeScheduler", (diffusers.EulerDiscreteScheduler,), {})
    assert schedulers.name_of(own) == "HomeMadeScheduler"
    assert schedulers.build("HomeMadeScheduler", own, 5) is not own
    with pytest.raises(ValueError, match="not in the table"):
        schedulers.build("OtherScheduler", own, 5)


def test_the_grids_of_consistency_schedulers_grow_with_the_steps() -> None:
    for name in ("lcm", "tcd"):
        scheduler = schedulers.build(name, PLAIN, 120)
        scheduler.set_timesteps(120)
        assert len(scheduler.timesteps) == 120


def test_each_lane_has_a_scheduler_of_its_own(driver: Driver) -> None:
    model = driver.engine._models["zero-snr"]
    one, other = (model.lane_pipeline("ddim", 4) for _ in range(2))
    assert one.scheduler is not other.scheduler
    assert model.pipeline.scheduler not in (one.scheduler, other.scheduler)
    assert one.unet is other.unet
