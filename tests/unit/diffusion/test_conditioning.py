"""Prompts reach the denoiser as they are written: against what diffusers' own pipelines do, and in the pictures."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import pytest
import torch
from diffusers import StableDiffusionPipeline

from services.diffusion.domain import Parameters, PerturbedAttention
from services.diffusion.engine.conditioning import Conditioner, Conditioning
from services.kit.faults import Fault, Kind
from tests.support import diffusion_families, tiny_diffusion

EMOJI_TINY = Path(__file__).parents[3] / "models" / "emoji-tiny"
FAMILIES = ("sd15", "sdxl", "sd3", "flux")
STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def _one_thread_without_gradients() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def emoji() -> Any:
    return _quiet(StableDiffusionPipeline.from_pretrained(EMOJI_TINY, dtype=torch.float32))


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("families")
    load = diffusers.DiffusionPipeline.from_pretrained
    made = {name: _quiet(load(maker(root / name))) for name, maker in diffusion_families.MAKERS.items()}
    without = load(tiny_diffusion.make_flow_folder(root / "without"), text_encoder_3=None, tokenizer_3=None)
    return {**made, "sd3-without-t5": _quiet(without)}


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def parameters(prompt: str, negative_prompt: str = "", *, guidance: float = 3.0, **fields: Any) -> Parameters:
    fields.setdefault("prompt_syntax", "weighted")
    return Parameters("m", prompt, negative_prompt, 64, 64, STEPS, guidance, "ddim", 7, **fields)


def prepared(pipeline: Any, prompt: str, negative_prompt: str = "", **fields: Any) -> Conditioning:
    asked = parameters(prompt, negative_prompt, **fields)
    conditioning = Conditioner(pipeline).prepare(asked, guided=asked.guidance_scale > 1)
    assert conditioning is not None
    return conditioning


@contextmanager
def told(denoiser: Any, conditioning: Conditioning, step: list[int]) -> Iterator[None]:
    """Stand around the denoiser's evaluations, as the engine does."""
    forward = denoiser.forward

    @functools.wraps(forward)
    def around(*args: Any, **kwargs: Any) -> Any:
        return conditioning.around(step[0], forward, args, kwargs)

    denoiser.forward = around
    try:
        yield
    finally:
        del denoiser.forward


def paint(pipeline: Any, prompt: str, negative_prompt: str = "", *, guidance: float = 3.0, **fields: Any) -> list[Any]:
    """The latents after every step."""
    step = [0]
    latents = []

    def on_step_end(_: Any, index: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(tensors["latents"].clone())
        step[0] = index + 1
        return {}

    asked = parameters(prompt, negative_prompt, guidance=guidance, **fields)
    conditioning = Conditioner(pipeline).prepare(asked, guided=guidance > 1)
    call = functools.partial(
        pipeline,
        width=64,
        height=64,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
        callback_on_step_end=on_step_end,
    )
    if conditioning is None:
        call(prompt=prompt, negative_prompt=negative_prompt or None)
        return latents
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    with told(denoiser, conditioning, step):
        call(**conditioning.arguments)
    return latents


def own_embeds(pipeline: Any, prompt: str, negative_prompt: str = "", clip_skip: int | None = None) -> dict[str, Any]:
    """What diffusers' pipeline makes of plain prompts, under the names of its arguments."""
    kind = type(pipeline).__name__
    if kind == "FluxPipeline":
        embeds, pooled, _ = pipeline.encode_prompt(prompt, None)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    options: dict[str, Any] = {"negative_prompt": negative_prompt or None, "do_classifier_free_guidance": True}
    if kind == "StableDiffusionPipeline":
        positive, negative = pipeline.encode_prompt(prompt, pipeline.device, 1, **options)
        return {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    options |= {"clip_skip": clip_skip}
    if kind == "StableDiffusion3Pipeline":
        options |= {"prompt_2": None, "prompt_3": None}
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return dict(zip(names, pipeline.encode_prompt(prompt, **options), strict=True))


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


# --- against the pipelines' own encoding ---


@pytest.mark.parametrize("family", [*FAMILIES, "sdxl-refiner", "sd3-without-t5"])
def test_a_plain_prompt_is_left_to_the_pipeline(families: dict[str, Any], family: str) -> None:
    conditioner = Conditioner(families[family])
    for guided in (True, False):
        assert conditioner.prepare(parameters("red panda", "ugly, bad"), guided=guided) is None
    assert conditioner.prepare(parameters("((red:", prompt_syntax="plain"), guided=True) is None
    assert conditioner.prepare(parameters("(red:1.5)"), guided=True) is not None


@pytest.mark.parametrize("family", [*FAMILIES, "sdxl-refiner", "sd3-without-t5"])
@pytest.mark.parametrize("negative", ["", "ugly"])
def test_a_weight_of_one_changes_no_bit(families: dict[str, Any], family: str, negative: str) -> None:
    prompt = "red panda" if family != "sd3-without-t5" else "red"
    ours = prepared(families[family], f"({prompt}:1)", negative).arguments
    assert same(ours, own_embeds(families[family], prompt, negative))


def test_a_weight_of_one_changes_no_bit_on_the_embedded_model(emoji: Any) -> None:
    assert same(prepared(emoji, "(red panda:1)", "cat").arguments, own_embeds(emoji, "red panda", "cat"))


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_clip_skip_is_that_of_the_pipeline(families: dict[str, Any], family: str) -> None:
    theirs = own_embeds(families[family], "red panda", "ugly", clip_skip=1)
    assert same(prepared(families[family], "red panda", "ugly", clip_skip=1).arguments, theirs)
    plain = prepared(families[family], "red panda", "ugly", clip_skip=1, prompt_syntax="plain")
    assert same(plain.arguments, theirs)
    assert not torch.equal(theirs["prompt_embeds"], own_embeds(families[family], "red panda")["prompt_embeds"])


def test_clip_skip_takes_an_earlier_layer_and_normalizes_it(emoji: Any) -> None:
    ids = emoji.tokenizer("red panda", padding="max_length", return_tensors="pt").input_ids
    layers = emoji.text_encoder(ids, output_hidden_states=True).hidden_states
    expected = emoji.text_encoder.final_layer_norm(layers[-3])
    assert torch.equal(prepared(emoji, "red panda", clip_skip=2).arguments["prompt_embeds"], expected)


def test_more_layers_than_there_are_cannot_be_skipped(emoji: Any, families: dict[str, Any]) -> None:
    assert prepared(emoji, "panda", clip_skip=4)
    for pipeline, skip, accepted in ((emoji, 5, "0 to 4"), (families["sdxl"], 3, "0 to 2"), (families["flux"], 1, "")):
        with pytest.raises(Fault, match="clip_skip") as caught:
            prepared(pipeline, "panda", clip_skip=skip)
        assert caught.value.data.fields[0].field == "clip_skip"
        assert accepted in caught.value.data.message


@pytest.mark.parametrize("family", [*FAMILIES, "sdxl-refiner"])
def test_weights_move_the_embedding_along_its_line_from_the_empty_prompt(families: dict[str, Any], family: str) -> None:
    pipeline = families[family]
    word = own_embeds(pipeline, "red")["prompt_embeds"]
    none = own_embeds(pipeline, "")["prompt_embeds"]
    for weight in (1.5, 0.5, -1.0):
        ours = prepared(pipeline, f"(red:{weight})").arguments["prompt_embeds"]
        # One token a letter, behind the begin token that only CLIP has; all else weighs 1.
        first = 0 if family == "flux" else 1
        letters = slice(first, first + 3)
        expected = none[:, letters] + weight * (word[:, letters] - none[:, letters])
        assert torch.allclose(ours[:, letters], expected, atol=1e-5)
        assert not torch.allclose(ours[:, letters], word[:, letters], atol=1e-3)
        assert torch.equal(ours[:, first + 4 : 70], word[:, first + 4 : 70])


# --- long prompts ---


def test_a_long_prompt_is_read_to_its_end(families: dict[str, Any]) -> None:
    long = "red panda, " * 20
    for family in ("sd15", "sdxl", "sd3"):
        ends = [prepared(families[family], long + end).arguments["prompt_embeds"] for end in ("cat", "dog")]
        assert ends[0].shape[1] == 3 * 77 + (256 if family == "sd3" else 0)
        assert not torch.equal(ends[0][:, 154:231], ends[1][:, 154:231])
        assert torch.equal(ends[0][:, :154], ends[1][:, :154])


def test_a_short_negative_prompt_is_filled_up_to_a_long_one(families: dict[str, Any]) -> None:
    arguments = prepared(families["sd15"], "x" * 100, "ugly").arguments
    negative = own_embeds(families["sd15"], "", "ugly")["negative_prompt_embeds"]
    none = own_embeds(families["sd15"], "")["prompt_embeds"]
    assert torch.equal(arguments["negative_prompt_embeds"], torch.cat([negative, none], dim=1))
    assert prepared(families["sd15"], "x", "u" * 100).arguments["prompt_embeds"].shape[1] == 154


def test_break_begins_the_next_chunk(families: dict[str, Any]) -> None:
    ours = prepared(families["sd15"], "red BREAK panda").arguments["prompt_embeds"]
    parts = [own_embeds(families["sd15"], text)["prompt_embeds"] for text in ("red", "panda")]
    assert torch.equal(ours, torch.cat(parts, dim=1))
    pooled = prepared(families["sdxl"], "red BREAK panda").arguments["pooled_prompt_embeds"]
    assert torch.equal(pooled, own_embeds(families["sdxl"], "red")["pooled_prompt_embeds"])


def test_the_end_of_a_long_prompt_changes_the_picture(emoji: Any) -> None:
    long = "red panda " * 45
    assert len(emoji.tokenizer(long, add_special_tokens=False)["input_ids"]) >= 80
    ends = [paint(emoji, long + end, guidance=1.0)[-1] for end in ("cat", "car")]
    assert not torch.equal(ends[0], ends[1])


def test_only_what_is_cut_off_is_warned_of(emoji: Any, families: dict[str, Any]) -> None:
    long = "red panda, " * 60
    for pipeline in (emoji, families["sd15"], families["sdxl"]):
        assert Conditioner(pipeline).cut_off(parameters(f"({long}:1.2) end")) == []
        (warning,) = Conditioner(pipeline).cut_off(parameters(long, prompt_syntax="plain"))
        assert warning.startswith("prompt: the model takes in ")
    # One token a letter, of which T5 has 255 and 511 beside its end token.
    for family, limit in (("sd3", 255), ("flux", 511)):
        (warning,) = Conditioner(families[family]).cut_off(parameters("red", f"({'a' * 600}:1.2)"))
        assert f"negative_prompt: the model takes in {limit} tokens" in warning
        assert Conditioner(families[family]).cut_off(parameters("red")) == []


# --- prompts that change over the steps ---


def test_a_weight_changes_the_picture(emoji: Any) -> None:
    plain, heavy = paint(emoji, "red apple")[-1], paint(emoji, "(red:1.5) apple")[-1]
    assert not torch.allclose(plain, heavy, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_editing_changes_from_its_step_on(families: dict[str, Any], family: str) -> None:
    pipeline = families[family]
    cat, edited = paint(pipeline, "cat", "ugly"), paint(pipeline, "[cat:dog:0.5]", "ugly")
    assert torch.equal(torch.stack(cat[:2]), torch.stack(edited[:2]))
    assert not torch.equal(cat[2], edited[2])


def test_editing_changes_the_pooled_embedding_too(families: dict[str, Any]) -> None:
    for family in ("sdxl", "sd3", "flux"):
        conditioning = prepared(families[family], "[cat:dog:1]", "[old:new:1]")
        seen: list[dict[str, Any]] = []
        key = "added_cond_kwargs" if family == "sdxl" else "pooled_projections"
        rows = 1 if family == "flux" else 2
        pooled = torch.zeros(rows, 1)
        given: dict[str, Any] = {"encoder_hidden_states": torch.zeros(rows, 1, 1)}
        given |= {key: {"text_embeds": pooled, "time_ids": pooled} if family == "sdxl" else pooled}
        conditioning.around(1, lambda seen=seen, **kwargs: seen.append(kwargs), (), given)
        expected = own_embeds(families[family], "dog", "new")
        negative = [] if family == "flux" else [expected["negative_pooled_prompt_embeds"]]
        told_pooled = seen[0][key]["text_embeds"] if family == "sdxl" else seen[0][key]
        assert torch.equal(told_pooled, torch.cat([*negative, expected["pooled_prompt_embeds"]]))


def test_the_negative_prompt_may_change_alone(emoji: Any) -> None:
    cat, edited = paint(emoji, "cat", "dog"), paint(emoji, "cat", "[dog:car:0.5]")
    assert torch.equal(cat[1], edited[1])
    assert not torch.equal(cat[2], edited[2])
    assert torch.equal(paint(emoji, "cat", "[dog:car:0.5]", guidance=1.0)[-1], paint(emoji, "cat", guidance=1.0)[-1])


def test_alternatives_take_turns(emoji: Any) -> None:
    turns = paint(emoji, "[cat|dog]")
    cat = paint(emoji, "cat")
    assert torch.equal(turns[0], cat[0])
    assert not torch.equal(turns[1], cat[1])
    assert torch.equal(turns[1], paint(emoji, "[cat:dog:1]")[1])


def test_perturbed_attention_has_a_second_positive_row(families: dict[str, Any]) -> None:
    conditioning = prepared(families["sd15"], "[cat:dog:1]", "ugly", perturbed_attention=PerturbedAttention())
    rows = conditioning.swapped(1, {"encoder_hidden_states": torch.zeros(3, 77, 32)})["encoder_hidden_states"]
    dog = own_embeds(families["sd15"], "dog", "ugly")
    assert torch.equal(rows, torch.cat([dog["negative_prompt_embeds"], dog["prompt_embeds"], dog["prompt_embeds"]]))
    kwargs = {"encoder_hidden_states": torch.zeros(3, 77, 32)}
    assert conditioning.swapped(0, kwargs) is kwargs


# --- AND ---


@pytest.mark.parametrize("family", ["emoji", "sd15", "sdxl", "sd3"])
def test_halves_of_the_same_prompt_are_the_prompt(emoji: Any, families: dict[str, Any], family: str) -> None:
    pipeline = emoji if family == "emoji" else families[family]
    alone = paint(pipeline, "cat", "ugly")[-1]
    halves = paint(pipeline, "cat :0.5 AND cat :0.5", "ugly")[-1]
    assert torch.allclose(alone, halves, atol=1e-4)
    assert not torch.allclose(alone, paint(pipeline, "cat :0.5 AND dog :0.5", "ugly")[-1], atol=1e-4)


def test_a_sub_prompt_of_weight_zero_changes_nothing(emoji: Any) -> None:
    assert torch.allclose(paint(emoji, "cat AND dog :0")[-1], paint(emoji, "cat")[-1], atol=1e-4)


def test_everything_that_has_rows_is_given_to_every_sub_prompt(families: dict[str, Any]) -> None:
    conditioning = prepared(families["sdxl"], "a AND b :2 AND c", "n")
    seen: dict[str, Any] = {}

    def forward(sample: torch.Tensor, timestep: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor]:
        seen.update(kwargs, sample=sample, timestep=timestep)
        return (torch.tensor([1.0, 2.0, 5.0, 10.0]).view(4, 1),)

    pair = torch.tensor([[0.0], [1.0]])
    (output,) = conditioning.around(
        0,
        forward,
        (pair, torch.tensor(999)),
        {
            "encoder_hidden_states": pair,
            "added_cond_kwargs": {"text_embeds": pair, "time_ids": pair},
            "down_block_additional_residuals": (pair, pair),
            "cross_attention_kwargs": None,
        },
    )
    spread = torch.tensor([[0.0], [1.0], [1.0], [1.0]])
    assert output.tolist() == [[1.0], [1.0 + 1.0 + 2 * 4.0 + 9.0]]
    for tensor in (seen["sample"], seen["added_cond_kwargs"]["time_ids"], *seen["down_block_additional_residuals"]):
        assert torch.equal(tensor, spread)
    assert seen["timestep"] == 999
    assert seen["encoder_hidden_states"].shape[0] == seen["added_cond_kwargs"]["text_embeds"].shape[0] == 4


@pytest.mark.parametrize(
    ("family", "fields", "kind", "what"),
    [
        ("sd15", {"guidance": 1.0}, Kind.INVALID_ARGUMENT, "AND needs guidance_scale above 1"),
        ("flux", {}, Kind.FAILED_PRECONDITION, "Flux has its guidance built in"),
        ("sd15", {"perturbed_attention": PerturbedAttention()}, Kind.INVALID_ARGUMENT, "perturbed_attention"),
    ],
)
def test_and_is_refused_where_it_cannot_be(
    families: dict[str, Any], family: str, fields: dict[str, Any], kind: Kind, what: str
) -> None:
    with pytest.raises(Fault, match=what) as caught:
        prepared(families[family], "cat AND dog", **fields)
    assert caught.value.data.kind is kind
    assert caught.value.data.metadata["field"] == "prompt"


# --- bounds, other pipelines, textual inversion ---


@pytest.mark.parametrize(
    ("prompt", "negative_prompt", "field", "what"),
    [
        ("(cat", "", "prompt", "never closed"),
        ("cat", "[a:b:c]", "negative_prompt", "several colons"),
        ("cat, " * 1600, "", "prompt", "at most 32 are accepted"),
        ("cat", "cat, " * 1600, "negative_prompt", "at most 32 are accepted"),
        ("[a|b|c|d|e|f]" + "x" * 2300, "", "prompt", "change less often"),
    ],
)
def test_what_would_take_too_long_to_encode_is_refused(
    families: dict[str, Any], prompt: str, negative_prompt: str, field: str, what: str
) -> None:
    asked = msgspec.structs.replace(parameters(prompt, negative_prompt), step_count=20)
    with pytest.raises(Fault, match=what) as caught:
        Conditioner(families["sd15"]).prepare(asked, guided=True)
    assert caught.value.data.kind is Kind.INVALID_ARGUMENT
    assert caught.value.data.fields[0].field == field


def test_timing_follows_the_steps_that_are_given(families: dict[str, Any]) -> None:
    conditioning = Conditioner(families["sd15"]).prepare(parameters("[cat:dog:0.5]"), guided=False, step_count=10)
    assert conditioning is not None
    kwargs = {"encoder_hidden_states": torch.zeros(1, 77, 32)}
    changed = [conditioning.swapped(step, kwargs) is not kwargs for step in range(12)]
    assert changed == [False] * 5 + [True] * 7


def test_other_pipelines_take_plain_prompts_only(emoji: Any) -> None:
    class Stranger:
        unet = emoji.unet
        tokenizer = emoji.tokenizer
        text_encoder = emoji.vae

        def __call__(self) -> None: ...

    conditioner = Conditioner(Stranger())
    assert conditioner.prepare(parameters("cat"), guided=True) is None
    with pytest.raises(Fault, match="a Stranger takes plain prompts only") as caught:
        conditioner.prepare(parameters("(cat:1.2)"), guided=True)
    assert caught.value.data.kind is Kind.FAILED_PRECONDITION


def test_a_word_of_several_vectors_may_be_weighed(tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(diffusion_families.make_sd15(tmp_path))
    torch.manual_seed(5)
    pipeline.load_textual_inversion({"zog": torch.randn(2, 32)}, token="zog")
    assert same(prepared(pipeline, "(red zog:1)").arguments, own_embeds(pipeline, "red zog"))
    ids = pipeline.tokenizer("red zog zog_1")["input_ids"]
    assert len(ids) == 2 + 3 + 2
    ours = prepared(pipeline, "red (zog:1.5)").arguments["prompt_embeds"]
    plain = own_embeds(pipeline, "red zog")["prompt_embeds"]
    differs = (ours - plain).abs().amax(dim=-1)[0] > 1e-4
    assert differs.tolist() == [4 <= position < 6 for position in range(77)]
