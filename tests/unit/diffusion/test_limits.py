"""A request is either refused with its wrong fields named, or becomes a job that keeps every limit."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inkwell.diffusion.v1 import diffusion_pb2 as pb
from services.diffusion import converters, limits
from services.diffusion.domain import MEDIA_TYPES, Asked, AskedHires, ModelInfo, PaintJob
from services.diffusion.settings import ModelSettings, Settings
from services.kit.faults import Fault, FaultData, Kind

MODEL = ModelInfo(
    name="small",
    pipeline="StableDiffusionPipeline",
    dtype="float32",
    parameter_count=1,
    default_width=64,
    default_height=64,
    size_multiple=16,
    default_step_count=20,
    default_guidance_scale=1.5,
    default_scheduler="ddim",
    prompt_token_limit=14,
    has_preview_autoencoder=True,
    schedulers=("ddim", "euler"),
    unfit_schedulers={"flow_euler": "it is for others"},
    family="sd",
    features=(
        "text",
        "image",
        "inpaint",
        "outpaint",
        "controls",
        "loras",
        "hires",
        "refiner",
        "variation",
        "clip_skip",
    ),
    vaes=("soft",),
)
SETTINGS = Settings(models={"small": ModelSettings(source="/models/small")}, max_side_px=500, max_pixels=100_000)
NOTHING_SET = converters.to_asked(pb.GenerateRequest())


def asked(**fields: Any) -> Asked:
    return dataclasses.replace(NOTHING_SET, **fields)


def refused(**fields: Any) -> dict[str, str]:
    with pytest.raises(Fault) as caught:
        limits.resolve(asked(**fields), MODEL, SETTINGS)
    return {violation.field: violation.description for violation in caught.value.data.fields}


def maybe(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


requests = st.builds(
    Asked,
    prompt=st.text(max_size=20),
    negative_prompt=st.text(max_size=20),
    width=maybe(st.integers(-(2**31), 2**31 - 1) | st.integers(1, 40).map(lambda n: n * 16)),
    height=maybe(st.integers(-(2**31), 2**31 - 1) | st.integers(1, 40).map(lambda n: n * 16)),
    step_count=maybe(st.integers(-(2**31), 2**31 - 1) | st.integers(1, 200)),
    guidance_scale=maybe(st.floats(width=32)),
    scheduler=st.sampled_from(["", "ddim", "euler", "flow_euler", "magic"]),
    seed=maybe(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 2**32 - 1)),
    image_count=maybe(st.integers(-(2**31), 2**31 - 1) | st.integers(1, 8)),
    batch_count=maybe(st.integers(-(2**31), 2**31 - 1) | st.integers(1, 8)),
    strength=maybe(st.floats(width=32)),
    clip_skip=maybe(st.integers(-2, 20)),
    guidance_rescale=maybe(st.floats(width=32)),
    media_type=st.sampled_from(["", *MEDIA_TYPES, "image/gif"]),
    quality=maybe(st.integers(-5, 105)),
    preview_disabled=st.booleans(),
    preview_interval=maybe(st.integers(-5, 300)),
)


def resolved_or_refused(request: Asked) -> PaintJob | FaultData:
    try:
        return limits.resolve(request, MODEL, SETTINGS)
    except Fault as fault:
        return fault.data


@given(requests)
def test_refused_or_within_every_limit(request: Asked) -> None:
    job = resolved_or_refused(request)
    if isinstance(job, FaultData):
        assert job.kind in (Kind.INVALID_ARGUMENT, Kind.NOT_FOUND)
        named = {field for violation in job.fields for field in violation.field.split(", ")}
        assert named
        assert {field.split(".")[0] for field in named} <= set(pb.GenerateRequest.DESCRIPTOR.fields_by_name)
        return
    p = job.parameters
    assert p.model == "small"
    assert p.width % 16 == p.height % 16 == 0
    assert 16 <= p.width <= 500
    assert 16 <= p.height <= 500
    assert p.width * p.height <= 100_000
    assert 1 <= p.step_count <= 200
    assert 0 <= p.guidance_scale <= 30
    assert p.scheduler in ("ddim", "euler")
    assert 1 <= job.batch_size <= 8
    assert len(job.pictures) == job.batch_size * (request.batch_count or 1)
    assert [picture.seed - p.seed for picture in job.pictures] == list(range(len(job.pictures)))
    assert 0 <= p.seed <= job.pictures[-1].seed <= 2**32 - 1
    assert job.media_type in MEDIA_TYPES
    assert 1 <= job.quality <= 100
    assert job.preview.interval is None or job.preview.interval >= 0
    assert p.clip_skip is None or 0 < p.clip_skip <= 11
    # What was asked for is what is done.
    for name in ("width", "height", "step_count", "seed"):
        assert getattr(request, name) in (None, getattr(p, name))


def test_an_empty_request_means_the_models_defaults() -> None:
    job = limits.resolve(NOTHING_SET, MODEL, SETTINGS)
    p = job.parameters
    assert (p.model, p.width, p.height, p.step_count, p.guidance_scale, p.scheduler) == (
        "small",
        64,
        64,
        20,
        1.5,
        "ddim",
    )
    assert (len(job.pictures), job.media_type, job.quality) == (1, "image/png", 95)
    assert job.preview.interval is None, "as often as is cheap"


def test_the_nearest_sizes_are_ones_that_are_accepted() -> None:
    assert refused(width=100) == {"width": "100 is not a multiple of 16 from 16 to 496; nearest accepted: 96 or 112"}
    assert refused(width=5) == {"width": "5 is not a multiple of 16 from 16 to 496; nearest accepted: 16"}
    assert refused(height=499) == {"height": "499 is not a multiple of 16 from 16 to 496; nearest accepted: 496"}
    limits.resolve(asked(width=496, height=192), MODEL, SETTINGS)
    assert "height may be up to 192" in refused(width=496, height=208)["width, height"]


def test_an_unfit_scheduler_says_why_and_what_is_fit() -> None:
    assert refused(scheduler="flow_euler") == {
        "scheduler": "flow_euler cannot serve small: it is for others; accepted: ddim, euler"
    }


def test_cost_grows_with_the_work() -> None:
    def cost(**fields: Any) -> float:
        return limits.cost(limits.resolve(asked(**fields), MODEL, SETTINGS), MODEL)

    assert cost(step_count=20) == 20
    assert cost(step_count=20, image_count=3) == 60
    assert cost(step_count=20, image_count=3, batch_count=2) == 120
    assert cost(step_count=20, hires=AskedHires(2.0, None, None, "", 10, 0.5)) == 20 + 5 * 4
    assert cost(step_count=20, width=128) == 40
    assert cost(step_count=20, guidance_scale=1.0) == 10


def test_unset_and_zero_are_told_apart() -> None:
    zero = converters.to_asked(
        pb.GenerateRequest(width=0, step_count=0, seed=0, image_count=0, output=pb.OutputOptions(quality=0))
    )
    assert (zero.width, zero.step_count, zero.seed, zero.image_count, zero.quality) == (0, 0, 0, 0, 0)
    assert (NOTHING_SET.width, NOTHING_SET.step_count, NOTHING_SET.seed, NOTHING_SET.quality) == (None,) * 4


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"models": {}}, "name at least one"),
        ({"default_model": "other"}, "not in models"),
        ({"models": {" ": ModelSettings(source="x")}}, "not a usable name"),
        ({"models": {"m": ModelSettings(source="x", default_step_count=500)}}, "above max_step_count"),
        ({"models": {"m": ModelSettings(source="x", default_guidance_scale=99)}}, "above max_guidance_scale"),
    ],
)
def test_settings_that_contradict_themselves_stop_the_start(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Settings(**fields)


def test_the_model_table_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INKWELL_DIFFUSION_MODELS", '{"mine": {"source": "/m", "default_guidance_scale": 5}}')
    monkeypatch.setenv("INKWELL_DIFFUSION_MAX_STEP_COUNT", "60")
    settings = Settings()
    assert settings.model_of_empty_name == "mine"
    assert settings.models["mine"].default_guidance_scale == 5
    assert settings.max_step_count == 60
