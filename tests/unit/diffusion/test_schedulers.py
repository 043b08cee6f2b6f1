"""Every scheduler of the table, on the noise schedules that models come with and in the pipelines that call it."""

import functools
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from services.diffusion.domain import Sampling
from services.diffusion.engine import schedulers
from services.diffusion.engine.previews import Prediction
from services.diffusion.scheduler_table import TABLE
from tests.support import tiny_diffusion

# diffusers' KDPM2 classes use numpy in ways that it will give up.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PLAIN = DDIMScheduler(clip_sample=False, **tiny_diffusion.PLAIN)
ZERO_SNR = DDIMScheduler(clip_sample=False, **tiny_diffusion.ZERO_SNR)
FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)
# As Flux.1-dev has it: shifted by the picture's size.
DYNAMIC_FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
EDM = EDMEulerScheduler()
EMBEDDED = Path(__file__).resolve().parents[3] / "models" / "emoji-tiny"
EMOJI = DDIMScheduler.from_pretrained(EMBEDDED, subfolder="scheduler")
OWN = {"plain": PLAIN, "zero-snr": ZERO_SNR, "flow": FLOW, "dynamic-flow": DYNAMIC_FLOW, "edm": EDM}
NOISE_NAMES = [name for name, entry in TABLE.items() if entry.family == "noise"]
FLOW_NAMES = [name for name, entry in TABLE.items() if entry.flow]
EDM_NAMES = [name for name, entry in TABLE.items() if entry.family == "edm"]
STOCHASTIC = ("ddpm", "euler_ancestral", "kdpm2_ancestral", "kdpm2_ancestral_karras", "lcm", "tcd", "flow_lcm")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Everything here is so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def served(kind: str) -> schedulers.Schedulers:
    return schedulers.Schedulers(OWN[kind])


def taking(option: str) -> list[str]:
    return [name for name, entry in TABLE.items() if option in entry.sampling_options]


def timesteps_of(scheduler: Any, step_count: int, **options: Any) -> Any:
    if scheduler.config.get("use_dynamic_shifting"):
        options["mu"] = 1.0
    scheduler.set_timesteps(step_count, **options)
    return scheduler.timesteps


def latents(seed: int = 0) -> Tensor:
    return torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(seed))


# --- the table against diffusers ---


@pytest.mark.parametrize("name", TABLE)
def test_the_table_describes_what_diffusers_has(name: str) -> None:
    entry = TABLE[name]
    known = inspect.signature(getattr(diffusers, entry.diffusers_class).__init__).parameters
    assert set(entry.overrides) <= set(known)
    assert entry.description.endswith(".")
    assert entry.aliases


@pytest.mark.parametrize("name", TABLE)
def test_the_options_are_those_of_the_class(name: str) -> None:
    """What a request may set is what the class has; what it lacks must not be offered."""
    entry = TABLE[name]
    cls = getattr(diffusers, entry.diffusers_class)
    made_with = inspect.signature(cls.__init__).parameters
    steps_with = inspect.signature(cls.set_timesteps).parameters
    spread_by_name = any(entry.overrides.get(f"use_{kind}_sigmas") for kind in ("karras", "exponential", "beta"))
    expected = set()
    if "use_karras_sigmas" in made_with and not entry.overrides.get("use_flow_sigmas"):
        expected.add("sigma_schedule")
    if "eta" in inspect.signature(cls.step).parameters:
        expected.add("eta")
    if entry.family == "noise":
        expected.add("prediction_type")
        # These two have the setting and never look at it.
        looked_at = "timestep_spacing" in made_with and name not in ("lcm", "tcd")
        if looked_at and (not spread_by_name or entry.spaces_sigmas):
            expected.add("timestep_spacing")
        if "timesteps" in steps_with and not spread_by_name and not name.startswith("heun"):
            expected.add("timesteps")
    # UniPC takes them for flow matching only, and there Flux does not pass them on; EDM's are no noise levels.
    if "sigmas" in steps_with and not spread_by_name and "unipc" not in name and entry.family != "edm":
        expected.add("sigmas")
    assert set(entry.sampling_options) == expected


@pytest.mark.parametrize("name", taking("timestep_spacing"))
def test_each_spacing_visits_other_timesteps(name: str) -> None:
    visited = set()
    for spacing in ("leading", "linspace", "trailing"):
        scheduler = served("plain").make(name, 7, Sampling(timestep_spacing=spacing))
        visited.add(tuple(timesteps_of(scheduler, 7).tolist()))
    assert len(visited) == 3


@pytest.mark.parametrize("name", taking("sigma_schedule"))
def test_each_sigma_schedule_spreads_the_noise_otherwise(name: str) -> None:
    kind = "flow" if TABLE[name].flow else "plain"
    spread = set()
    for schedule in ("karras", "exponential", "beta"):
        scheduler = served(kind).make(name, 7, Sampling(sigma_schedule=schedule))
        timesteps_of(scheduler, 7)
        spread.add(tuple(scheduler.sigmas.tolist()))
    assert len(spread) == 3
    # The next picture has nothing of it.
    again = served(kind).make(name, 7)
    timesteps_of(again, 7)
    untouched = schedulers.build(name, OWN[kind], 7)
    timesteps_of(untouched, 7)
    assert torch.equal(again.sigmas, untouched.sigmas)


def test_a_schedule_overrides_what_the_name_says() -> None:
    by_name = served("plain").make("euler_karras", 7)
    overridden = served("plain").make("euler", 7, Sampling(sigma_schedule="karras"))
    other = served("plain").make("euler_karras", 7, Sampling(sigma_schedule="beta"))
    for scheduler in (by_name, overridden, other):
        timesteps_of(scheduler, 7)
    assert torch.equal(by_name.sigmas, overridden.sigmas)
    assert not torch.equal(by_name.sigmas, other.sigmas)


@pytest.mark.parametrize("name", NOISE_NAMES)
def test_each_prediction_type_is_understood_or_refused(name: str) -> None:
    for kind in ("epsilon", "v_prediction", "sample"):
        scheduler = served("plain").make(name, 8, Sampling(prediction_type=kind))
        if kind in TABLE[name].prediction_types:
            assert schedulers._trial(scheduler, 8) < 2
        elif name != "pndm":  # which takes any other word for epsilon
            with pytest.raises((NotImplementedError, ValueError)):
                schedulers._trial(scheduler, 8)


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "dpmpp_2s", "unipc", "lms"])
def test_options_are_what_diffusers_makes_of_them(name: str) -> None:
    options = {"use_exponential_sigmas": True, "prediction_type": "v_prediction"}
    theirs = getattr(diffusers, TABLE[name].diffusers_class).from_config(
        PLAIN.config, **{**TABLE[name].overrides, **options}
    )
    ours = served("plain").make(name, 9, Sampling(sigma_schedule="exponential", prediction_type="v_prediction"))
    assert ours.config.prediction_type == theirs.config.prediction_type
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(9)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert ours.init_noise_sigma == theirs.init_noise_sigma


# --- which can serve which model ---


def test_which_fit_which_model() -> None:
    assert set(served("plain").fit) == set(NOISE_NAMES)
    assert set(served("zero-snr").fit) == set(NOISE_NAMES)
    assert set(served("flow").fit) == set(FLOW_NAMES)
    assert set(served("dynamic-flow").fit) == set(FLOW_NAMES)
    assert set(served("edm").fit) == set(EDM_NAMES)
    assert "trained with flow matching" in served("plain").unfit["flow_euler"]
    assert "trained with noise prediction" in served("flow").unfit["ddim"]
    assert "trained with EDM's preconditioning" in served("flow").unfit["edm_euler"]


@pytest.mark.parametrize("own", [PLAIN, ZERO_SNR, EMOJI], ids=["plain", "zero-snr", "emoji"])
@pytest.mark.parametrize("name", NOISE_NAMES)
def test_noise_schedules_that_are_not_tried_at_loading_are_tried_here(
    name: str, own: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = schedulers._why_unfit(schedulers.build(name, own, max(schedulers._TRIAL_STEPS)))
    monkeypatch.setattr(schedulers, "_why_unfit", lambda scheduler: pytest.fail("tried at loading"))
    assert schedulers._verdict(name, own) == tried


def test_an_unusual_noise_schedule_is_tried_at_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = dict(tiny_diffusion.PLAIN)
    monkeypatch.setattr(schedulers, "_why_unfit", lambda scheduler: "tried")
    monkeypatch.setattr(schedulers, "_verdicts", {})
    for unusual in ({"beta_end": 0.02}, {"num_train_timesteps": 500}, {"trained_betas": [0.001] * 1000}):
        own = DDIMScheduler(clip_sample=False, **{**plain, **unusual})
        assert schedulers._verdict("euler", own) == "tried"
    # As SDXL has it, and with an end of its own.
    own = diffusers.EulerDiscreteScheduler(**plain, interpolation_type="linear", timestep_spacing="leading")
    assert schedulers._verdict("dpmpp_2m", own) is None
    own = diffusers.EulerDiscreteScheduler(**plain, final_sigmas_type="sigma_min")
    assert schedulers._verdict("dpmpp_2m", own) == "tried"


def test_one_that_diverges_is_found_out_without_the_model() -> None:
    wild = schedulers.build("euler", PLAIN, 20)
    step = wild.step
    wild.step = lambda output, timestep, sample, **options: (step(output, timestep, sample, **options)[0] * 10,)
    assert schedulers._why_unfit(wild) == "it diverges on this model's noise schedule"
    broken = schedulers.build("euler", PLAIN, 20)
    broken.scale_model_input = lambda sample, timestep: sample[99]
    assert "IndexError" in (schedulers._why_unfit(broken) or "")


@pytest.mark.parametrize("name", ["dpmpp_2m_karras", "dpmpp_2m_sde_karras", "dpmpp_3m", "dpmpp_3m_sde_exponential"])
def test_steps_whose_timesteps_round_alike_are_all_taken(name: str) -> None:
    """Near pure noise many steps of a Karras spacing share the timestep 999."""
    scheduler = served("zero-snr").make(name, 150)
    scheduler.set_timesteps(150)
    sample = torch.zeros(1, 1, 1, 1)
    for timestep in scheduler.timesteps:
        sample = scheduler.step(sample, timestep, sample, return_dict=False)[0]
    assert scheduler.step_index == 150


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((kind, name) for kind in ("plain", "zero-snr") for name in NOISE_NAMES if name not in STOCHASTIC),
        *(("flow", name) for name in FLOW_NAMES if name not in STOCHASTIC),
        *(("edm", name) for name in EDM_NAMES),
    ],
)
def test_a_perfect_model_is_followed_to_its_picture(kind: str, name: str) -> None:
    clean = torch.linspace(-1, 1, 64).reshape(1, 4, 4, 4)
    scheduler = served(kind).make(name, 20)
    scheduler.set_timesteps(20)
    generator = torch.Generator().manual_seed(0)
    schedulers.draw_from(scheduler, generator)
    sample = latents() * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
        output = schedulers._output_for(scheduler, seen, timestep, clean)
        sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
    assert float((sample - clean).abs().max()) < 0.15


@pytest.mark.parametrize("kind", ["plain", "zero-snr", "flow", "edm"])
def test_previews_show_what_the_model_believes(kind: str) -> None:
    """From a perfect model's answers the clean latents come out at every step, whatever the scheduler."""
    clean = torch.linspace(-1, 1, 64).reshape(1, 4, 4, 4)
    for name in served(kind).fit:
        scheduler = served(kind).make(name, 12)
        prediction = Prediction(scheduler)
        assert prediction.clean_latents() is None
        scheduler.set_timesteps(12)
        sample = latents() * float(getattr(scheduler, "init_noise_sigma", 1.0))
        for timestep in scheduler.timesteps:
            seen = scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
            sample = scheduler.step(
                schedulers._output_for(scheduler, seen, timestep, clean), timestep, sample, return_dict=False
            )[0]
            believed = prediction.clean_latents()
            assert believed is not None
            # Schedulers round timesteps, and around pure noise a rounded timestep is a different noise level.
            assert float((believed - clean).abs().mean()) < 0.2, (name, timestep)


def test_a_scheduler_that_is_not_understood_makes_no_prediction() -> None:
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(4)
    prediction = Prediction(scheduler)
    scheduler.step(latents(), scheduler.timesteps[0], latents())
    assert prediction.clean_latents() is None


def test_a_sigma_scheduler_starts_where_a_zero_snr_model_was_trained_to_start() -> None:
    """Classes that know nothing of zero terminal SNR get the rescaled noise schedule all the same."""
    ours = schedulers.build("deis", ZERO_SNR, 10)
    theirs = DPMSolverMultistepScheduler.from_config(ZERO_SNR.config)
    assert ours.alphas_cumprod[-1] == pytest.approx(float(theirs.alphas_cumprod[-1]), rel=0.05)
    assert torch.allclose(ours.alphas_cumprod[:-1], theirs.alphas_cumprod[:-1], rtol=1e-3)


# --- the model's own scheduler ---


def test_the_models_own_scheduler_is_taken_as_it_is() -> None:
    own = DDIMScheduler(**tiny_diffusion.PLAIN, clip_sample=True, clip_sample_range=3.0)
    assert schedulers.name_of(own) == "ddim"
    assert dict(schedulers.build("ddim", own, 20).config) == dict(own.config)
    # Another class must not clip latents just because its own default is to.
    assert schedulers.build("lcm", own, 20).config.clip_sample is False


@pytest.mark.parametrize("name", TABLE)
def test_names_survive_being_a_models_own(name: str) -> None:
    own = {"noise": PLAIN, "flow": FLOW, "edm": EDM}[TABLE[name].family]
    assert schedulers.name_of(schedulers.build(name, own, 20)) == name


def test_one_that_the_table_lacks_keeps_its_class_name() -> None:
    own = diffusers.EulerDiscreteScheduler.from_config(PLAIN.config)
    own.__class__ = type("HomeMadeScheduler", (diffusers.EulerDiscreteScheduler,), {})
    assert schedulers.name_of(own) == "HomeMadeScheduler"
    assert schedulers.build("HomeMadeScheduler", own, 5) is not own
    with pytest.raises(ValueError, match="not in the table"):
        schedulers.build("OtherScheduler", own, 5)
    assert "HomeMadeScheduler" in schedulers.Schedulers(own).fit


def test_a_flow_models_shift_goes_along_to_every_class() -> None:
    own = FlowMatchEulerDiscreteScheduler(shift=5.0)
    assert schedulers.build("flow_dpmpp_2m", own, 20).config.flow_shift == 5.0
    assert schedulers.build("flow_heun", own, 20).config.shift == 5.0
    multistep = schedulers.build("flow_dpmpp_2m", own, 20)
    assert schedulers.build("flow_euler", multistep, 20).shift == 5.0


def test_the_grids_of_consistency_schedulers_grow_with_the_steps() -> None:
    for name in ("lcm", "tcd"):
        scheduler = served("plain").make(name, 120)
        scheduler.set_timesteps(120)
        assert len(scheduler.timesteps) == 120


def test_each_lane_has_a_scheduler_of_its_own() -> None:
    one, other = (served("zero-snr").make("ddim", 4) for _ in range(2))
    assert one is not other
    assert ZERO_SNR not in (one, other)
    with pytest.raises(KeyError):
        served("zero-snr").make("flow_euler", 4)


# --- inside the pipelines ---


def vae(channels: int = 4, **options: Any) -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=channels,
        norm_num_groups=4,
        mid_block_add_attention=False,
        **options,
    ).eval()


@functools.cache
def parts(kind: str) -> dict[str, Any]:
    torch.manual_seed(0)
    if kind == "sd":
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=8,
            attention_head_dim=4,
            norm_num_groups=4,
        ).eval()
        nothing = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
        return {"unet": unet, "vae": vae(), "requires_safety_checker": False, **nothing}
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    if kind == "sd3":
        transformer = SD3Transformer2DModel(
            sample_size=8,
            in_channels=16,
            out_channels=16,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            caption_projection_dim=16,
            pooled_projection_dim=8,
        ).eval()
        nothing |= dict.fromkeys(("text_encoder_3", "tokenizer_3"))
        return {"transformer": transformer, "vae": vae(16, shift_factor=0.06), **nothing}
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    return {"transformer": transformer, "vae": vae(shift_factor=0.06), **nothing}


def run(pipeline: Any, scheduler: Any, **arguments: Any) -> Tensor:
    pipeline.scheduler = scheduler
    pipeline.set_progress_bar_config(disable=True)
    embeds = torch.linspace(-1, 1, 4 * 8).reshape(1, 4, 8)
    given = {
        "prompt_embeds": embeds,
        "negative_prompt_embeds": -embeds,
        "generator": torch.Generator().manual_seed(3),
        "output_type": "pt",
        "guidance_scale": 2.0,
        "num_inference_steps": 5,
        **arguments,
    }
    if "transformer" in pipeline.components:
        given["pooled_prompt_embeds"] = embeds[:, 0]
        given["negative_pooled_prompt_embeds"] = -embeds[:, 0]
    if "image" not in given:
        given |= {"width": 16, "height": 16}
    images: Tensor = pipeline(**given).images
    assert bool(torch.isfinite(images).all())
    return images


def picture(seed: int = 0) -> Tensor:
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NOISE_NAMES)
@pytest.mark.parametrize(("kind", "step_count"), [("plain", 1), ("zero-snr", 4)])
def test_each_that_fits_paints(kind: str, step_count: int, name: str) -> None:
    pipeline = StableDiffusionPipeline(**parts("sd"), scheduler=OWN[kind])
    run(pipeline, served(kind).make(name, step_count), num_inference_steps=step_count)


@pytest.mark.parametrize("name", FLOW_NAMES)
@pytest.mark.parametrize("kind", ["flow", "dynamic-flow"])
def test_each_that_fits_paints_with_flow_matching_models(kind: str, name: str) -> None:
    """Text to image, image to image and inpainting call the scheduler with arguments of their own."""
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    own = OWN[kind]
    makers: list[Any] = [StableDiffusion3Pipeline, StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline]
    makers += [FluxPipeline, FluxImg2ImgPipeline, FluxInpaintPipeline]
    for maker in makers:
        pipeline = maker(**parts("flux" if "Flux" in maker.__name__ else "sd3"), scheduler=own)
        arguments: dict[str, Any] = {}
        if "Img2Img" in maker.__name__:
            arguments = {"image": picture(), "strength": 0.6, "width": 16, "height": 16}
        elif "Inpaint" in maker.__name__:
            arguments = {"image": picture(), "mask_image": mask, "strength": 0.6, "width": 16, "height": 16}
        run(pipeline, served(kind).make(name, 4), num_inference_steps=4, **arguments)


@pytest.mark.parametrize("name", ["flow_heun", "flow_dpmpp_2m", "flow_dpmpp_2s"])
def test_a_shift_by_size_reaches_schedulers_that_know_only_a_fixed_one(name: str) -> None:
    scheduler = served("dynamic-flow").make(name, 5)
    run(FluxPipeline(**parts("flux"), scheduler=DYNAMIC_FLOW), scheduler)
    expected = schedulers.build(name, FlowMatchEulerDiscreteScheduler(shift=1.0), 5)
    tokens = 4 * 4  # of a picture of 16 pixels, 2 a latent, packed 2 by 2
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    key = "shift" if name == "flow_heun" else "flow_shift"
    expected.register_to_config(**{key: float(torch.tensor(mu, dtype=torch.float64).exp())})
    expected.set_timesteps(5)
    assert torch.allclose(scheduler.sigmas, expected.sigmas)


@pytest.mark.parametrize("name", ["flow_lcm", "flow_dpmpp_2m_sde", "dpmpp_sde", "euler_ancestral"])
def test_noise_is_drawn_from_the_pictures_own_generator(name: str) -> None:
    flow = TABLE[name].flow
    own = FLOW if flow else PLAIN
    pipeline: Any = (StableDiffusion3Pipeline if flow else StableDiffusionPipeline)(
        **parts("sd3" if flow else "sd"), scheduler=own
    )
    painted = []
    for global_seed, seed in ((1, 3), (2, 3), (2, 4)):
        torch.manual_seed(global_seed)
        scheduler = served("flow" if flow else "plain").make(name, 5)
        generator = torch.Generator().manual_seed(seed)
        schedulers.draw_from(scheduler, generator)
        painted.append(run(pipeline, scheduler, generator=generator))
    assert torch.equal(painted[0], painted[1])
    assert not torch.equal(painted[1], painted[2])


@pytest.mark.parametrize("name", ["ddim", "euler", "euler_ancestral", "dpmpp_2m_karras", "unipc", "lms"])
def test_without_options_the_picture_is_diffusers_own(name: str) -> None:
    pipeline = StableDiffusionPipeline(**parts("sd"), scheduler=PLAIN)
    ours = run(pipeline, served("plain").make(name, 5))
    cls = getattr(diffusers, TABLE[name].diffusers_class)
    theirs = cls.from_config(PLAIN.config, **TABLE[name].overrides)
    assert torch.equal(ours, run(pipeline, theirs))


@pytest.mark.parametrize("strength", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpmpp_2m_karras", "dpmpp_2s", "lcm"])
def test_a_picture_to_start_from_is_taken_up_where_diffusers_does(name: str, strength: float) -> None:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    theirs = schedulers.build(name, PLAIN, 6)
    for maker, more in (
        (StableDiffusionImg2ImgPipeline, {}),
        (StableDiffusionInpaintPipeline, {"mask_image": mask, "width": 16, "height": 16}),
    ):
        pipeline = maker(**parts("sd"), scheduler=PLAIN)
        arguments = {"image": picture(), "strength": strength, "num_inference_steps": 6, **more}
        ours = run(pipeline, served("plain").make(name, 6), **arguments)
        assert torch.equal(ours, run(pipeline, theirs, **arguments)), maker.__name__


@pytest.mark.parametrize(
    "pipeline",
    [
        StableDiffusionXLImg2ImgPipeline,
        StableDiffusionXLInpaintPipeline,
        StableDiffusion3Img2ImgPipeline,
        StableDiffusion3InpaintPipeline,
        FluxImg2ImgPipeline,
        FluxInpaintPipeline,
    ],
)
def test_the_first_step_is_the_one_that_the_pipeline_says(pipeline: Any) -> None:
    xl = "XL" in pipeline.__name__
    starts = [{"strength": 0.3}, {"strength": 1.0}]
    if xl:
        starts.append({"strength": 0.3, "denoising_start": 0.8})
    for name in ("euler", "heun", "dpmpp_2m_karras", "unipc") if xl else FLOW_NAMES:
        for start in starts:
            scheduler = served("plain" if xl else "flow").make(name, 20)
            scheduler.set_timesteps(20)
            timesteps, _ = pipeline.get_timesteps(SimpleNamespace(scheduler=scheduler), 20, device="cpu", **start)
            place = len(scheduler.timesteps) - len(timesteps)
            scheduler.step(latents(), timesteps[0], latents(), return_dict=False)
            assert scheduler.step_index == place + 1, (name, start)


# --- steps by hand ---


@pytest.mark.parametrize("name", taking("timesteps"))
def test_timesteps_by_hand_are_those_visited(name: str) -> None:
    sampling = Sampling(timesteps=(999, 759, 499, 279, 19))
    scheduler = served("plain").make(name, 5, sampling)
    for maker, more in (
        (StableDiffusionPipeline, {}),
        (StableDiffusionImg2ImgPipeline, {"image": picture(), "strength": 0.6}),
    ):
        pipeline: Any = maker(**parts("sd"), scheduler=PLAIN)
        run(pipeline, scheduler, **more, **schedulers.pipeline_arguments(name, sampling))
        assert [int(timestep) for timestep in scheduler.timesteps] == list(sampling.timesteps)


@pytest.mark.parametrize("end", [(), (0.0,)])
def test_sigmas_by_hand_are_the_noise_levels(end: tuple[float, ...]) -> None:
    sampling = Sampling(sigmas=(14.0, 5.0, 1.0, 0.25, *end))
    scheduler = served("plain").make("euler", 4, sampling)
    arguments = schedulers.pipeline_arguments("euler", sampling)
    run(StableDiffusionPipeline(**parts("sd"), scheduler=PLAIN), scheduler, **arguments)
    assert scheduler.sigmas.tolist() == [14.0, 5.0, 1.0, 0.25, 0.0]
    assert len(scheduler.timesteps) == 4


@pytest.mark.parametrize("name", [name for name in taking("sigmas") if TABLE[name].flow])
def test_sigmas_by_hand_of_flow_matching_models_are_shifted_like_their_own(name: str) -> None:
    sampling = Sampling(sigmas=(0.75, 0.5, 0.25, 0.0))
    for maker, kind in ((StableDiffusion3Pipeline, "sd3"), (FluxPipeline, "flux")):
        scheduler = served("flow").make(name, 3, sampling)
        arguments = schedulers.pipeline_arguments(name, sampling)
        run(maker(**parts(kind), scheduler=FLOW), scheduler, **arguments)
        shifted = [3 * sigma / (1 + 2 * sigma) for sigma in (0.75, 0.5, 0.25)]
        assert scheduler.sigmas.tolist() == pytest.approx([*shifted, 0.0])


def test_eta_reaches_the_step() -> None:
    pipeline = StableDiffusionPipeline(**parts("sd"), scheduler=PLAIN)
    for name in ("ddim", "tcd"):
        plain, noisy, again = (
            run(pipeline, served("plain").make(name, 5), **schedulers.pipeline_arguments(name, Sampling(eta=eta)))
            for eta in (0.0, 1.0, 1.0)
        )
        assert torch.equal(noisy, again)
        assert not torch.equal(plain, noisy)
