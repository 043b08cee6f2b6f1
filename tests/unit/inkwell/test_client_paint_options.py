"""Everything that a picture can be asked for, with both clients: what is sent, refused, and comes back."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest

import inkwell
from inkwell.diffusion.v1 import diffusion_pb2
from tests.unit.inkwell.fake_server import InkwellServer

# Every option that there is, none at its default.
FULL: inkwell.PaintOptions = {
    "negative_prompt": "n",
    "model": "m",
    "width": 8,
    "height": 16,
    "guidance_scale": 0.0,
    "scheduler": "ddim",
    "seed": 0,
    "image_count": 1,
    "batch_count": 2,
    "media_type": "image/webp",
    "quality": 80,
    "prompt_syntax": "plain",
    "styles": ["ink", "wash"],
    "wildcard_seed": 0,
    "image": b"photo",
    "strength": 0.6,
    "inpaint": inkwell.Inpaint(b"mask", 4, True, 32, "noise"),
    "outpaint": inkwell.Outpaint(1, 2, 3, 4, 0, inkwell.MaskFill.GREY),
    "controls": [inkwell.Control(b"edges", "edges", "canny", 0.8, 0.1, 0.9), inkwell.Control(b"pose")],
    "image_prompts": [inkwell.ImagePrompt(b"style", "ip", 0.3)],
    "loras": [inkwell.Lora("flat", -0.5), "round", ("old", 0.0)],
    "hires": inkwell.Hires(upscaler="latent", width=16, height=32, step_count=9, strength=0.7),
    "refiner": inkwell.Refiner("fine", 0.9),
    "sampling": inkwell.Sampling("karras", "trailing", "v-prediction", 0.0, (999, 500), ()),
    "guidance_rescale": 0.0,
    "perturbed_attention": inkwell.PerturbedAttention(3.5, 0.5),
    "freeu": inkwell.FreeU(0.9, 0.2, 1.5, 1.6),
    "clip_skip": 0,
    "progress_interval_ms": 250,
    "variation": inkwell.Variation(0, 0.25),
    "vae": inkwell.Vae("sharp", tiled=True, upcast=True),
    "previews": True,
    "preview_interval": 5,
    "preview_method": "linear",
    "preview_max_side_px": 64,
}


def test_every_option_is_sent(client: inkwell.Client, server: InkwellServer) -> None:
    client.paint("a cat", **FULL)
    (request,) = server.requests
    pb = diffusion_pb2
    expected = pb.GenerateRequest(
        prompt="a cat", negative_prompt="n", model="m", width=8, height=16, guidance_scale=0, scheduler="ddim", seed=0,
        image_count=1, batch_count=2, prompt_syntax=pb.PROMPT_SYNTAX_PLAIN, styles=["ink", "wash"], wildcard_seed=0,
        strength=0.6, guidance_rescale=0, clip_skip=0, progress_interval_ms=250,
    )  # fmt: skip
    expected.output.media_type, expected.output.quality = "image/webp", 80
    expected.preview.CopyFrom(
        pb.PreviewOptions(step_interval=5, method=pb.PREVIEW_METHOD_LINEAR, max_side_px=64, disabled=False)
    )
    expected.image.content = b"photo"
    expected.inpaint.CopyFrom(pb.Inpaint(blur_px=4, inverted=True, crop_padding_px=32, fill=pb.MASK_FILL_NOISE))
    expected.inpaint.mask.content = b"mask"
    expected.outpaint.CopyFrom(
        pb.Outpaint(left_px=1, top_px=2, right_px=3, bottom_px=4, blur_px=0, fill=pb.MASK_FILL_GREY)
    )
    expected.controls.add(
        model="edges", image={"content": b"edges"}, preprocessor="canny", scale=0.8, start=0.1, end=0.9
    )
    expected.controls.add(image={"content": b"pose"})
    expected.image_prompts.add(adapter="ip", image={"content": b"style"}, scale=0.3)
    expected.loras.add(name="flat", weight=-0.5)
    expected.loras.add(name="round")
    expected.loras.add(name="old", weight=0)
    expected.hires.CopyFrom(pb.Hires(width=16, height=32, upscaler="latent", step_count=9, strength=0.7))
    expected.refiner.CopyFrom(pb.Refiner(model="fine", switch_at=0.9))
    expected.sampling.CopyFrom(
        pb.Sampling(
            sigma_schedule=pb.SIGMA_SCHEDULE_KARRAS, timestep_spacing=pb.TIMESTEP_SPACING_TRAILING,
            prediction_type=pb.PREDICTION_TYPE_V_PREDICTION, eta=0, timesteps=[999, 500],
        )
    )  # fmt: skip
    expected.perturbed_attention.CopyFrom(pb.PerturbedAttention(scale=3.5, adaptive_scale=0.5))
    expected.freeu.CopyFrom(pb.FreeU(s1=0.9, s2=0.2, b1=1.5, b2=1.6))
    expected.variation.CopyFrom(pb.Variation(seed=0, strength=0.25))
    expected.vae.CopyFrom(pb.Vae(name="sharp", tiled=True, upcast=True))
    assert request == expected
    # Nothing that can be asked for is missing in this test, the count of steps aside, which goes with others.
    assert {field.name for field in pb.GenerateRequest.DESCRIPTOR.fields} - {"step_count"} == {
        field.name for field, _ in request.ListFields()
    }


SHORT: dict[str, tuple[Any, Any]] = {
    "inpaint": (b"mask", inkwell.Inpaint(b"mask")),
    "hires": (2, inkwell.Hires(scale=2)),
    "refiner": ("fine", inkwell.Refiner("fine")),
    "perturbed_attention": (3.0, inkwell.PerturbedAttention(3.0)),
    "vae": ("sharp", inkwell.Vae("sharp")),
    "controls": ([b"edges"], [inkwell.Control(b"edges")]),
    "image_prompts": (b"style", [inkwell.ImagePrompt(b"style")]),
    "loras": ("flat", [inkwell.Lora("flat")]),
    "styles": ("ink", ["ink"]),
}


@pytest.mark.parametrize("name", SHORT)
def test_the_first_field_alone_will_do(client: inkwell.Client, server: InkwellServer, name: str) -> None:
    for value in SHORT[name]:
        client.paint("a cat", **{name: value})
    short, long = server.requests
    assert short == long
    assert name in {field.name for field, _ in short.ListFields()}


@pytest.mark.parametrize(
    "option", ["inpaint", "outpaint", "hires", "refiner", "sampling", "perturbed_attention", "freeu", "vae"]
)
def test_an_empty_part_is_sent_all_the_same(client: inkwell.Client, server: InkwellServer, option: str) -> None:
    empty: dict[str, Any] = {
        "inpaint": inkwell.Inpaint(b""), "outpaint": inkwell.Outpaint(), "hires": inkwell.Hires(),
        "refiner": inkwell.Refiner(""), "sampling": inkwell.Sampling(),
        "perturbed_attention": inkwell.PerturbedAttention(), "freeu": inkwell.FreeU(), "vae": inkwell.Vae(),
    }  # fmt: skip
    client.paint("a cat", **{option: empty[option]})
    assert server.requests[0].HasField(option)


def test_none_is_as_good_as_left_out(client: inkwell.Client, server: InkwellServer) -> None:
    client.paint("a cat", **dict.fromkeys(FULL))
    client.paint("a cat")
    assert server.requests[0] == server.requests[1]


def test_pictures_may_be_files_bytes_or_painted_ones(
    client: inkwell.Client, server: InkwellServer, tmp_path: Path
) -> None:
    (tmp_path / "photo.png").write_bytes(b"photo")
    first = client.paint("a cat")[0]
    for source in (tmp_path / "photo.png", str(tmp_path / "photo.png"), bytearray(b"photo"), memoryview(b"photo")):
        client.paint("a cat", image=source)
        assert server.requests[-1].image.content == b"photo"
    client.paint("a cat", image=first, controls=[first, inkwell.Control(first)])
    assert {each.image.content for each in [server.requests[-1], *server.requests[-1].controls]} == {first.content}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"image": 7}, "image"),
    ({"inpaint": inkwell.Inpaint(None)}, "inpaint.mask"),  # type: ignore[arg-type]
    ({"inpaint": 7}, "inpaint"),
    ({"inpaint": inkwell.Inpaint(b"", fill="blue")}, "inpaint.fill"),
    ({"inpaint": inkwell.Inpaint(b"", blur_px=2**40)}, "inpaint.blur_px"),
    ({"outpaint": 64}, "outpaint"),
    ({"controls": [inkwell.Control(b""), 7]}, "controls[1]"),
    ({"controls": [inkwell.Control(b"", scale="much")]}, "controls[0].scale"),  # type: ignore[arg-type]
    ({"controls": 7}, "controls"),
    ({"loras": ("flat", 0.8)}, "loras[1]"),
    ({"loras": [("flat", "much")]}, "loras[0].weight"),
    ({"hires": True}, "hires"),
    ({"hires": inkwell.Hires(upscaler=4)}, "hires.upscaler"),  # type: ignore[arg-type]
    ({"sampling": "karras"}, "sampling"),
    ({"sampling": inkwell.Sampling("cosine")}, "sampling.sigma_schedule"),
    ({"sampling": inkwell.Sampling(timesteps=(999, 1.5))}, "sampling.timesteps[1]"),  # type: ignore[arg-type]
    ({"vae": inkwell.Vae(tiled="yes")}, "vae.tiled"),  # type: ignore[arg-type]
    ({"prompt_syntax": "sdnext"}, "prompt_syntax"),
    ({"styles": 7}, "styles"),
    ({"styles": ["ink", 7]}, "styles[1]"),
    ({"preview_method": "full"}, "preview.method"),
    ({"preview_interval": "often"}, "preview.step_interval"),
]


@pytest.mark.parametrize(("options", "field"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_what_the_request_cannot_hold_is_refused_by_name(
    client: inkwell.Client, server: InkwellServer, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(inkwell.InvalidRequest) as raised:
        client.paint("a cat", **options)
    assert raised.value.fields[0].field == field
    assert not server.requests


def test_names_are_listed_where_one_is_wrong(client: inkwell.Client) -> None:
    with pytest.raises(inkwell.InvalidRequest, match="karras, exponential, beta"):
        client.paint("a cat", sampling=inkwell.Sampling("cosine"))


def test_an_option_that_there_is_not_is_a_type_error(client: inkwell.Client, server: InkwellServer) -> None:
    with pytest.raises(TypeError, match="stepz"):
        client.paint("a cat", stepz=3)  # type: ignore[call-arg]
    assert not server.requests


def test_a_missing_file_is_an_oserror_before_anything_is_sent(client: inkwell.Client, server: InkwellServer) -> None:
    with pytest.raises(FileNotFoundError):
        client.paint("a cat", image="missing.png")
    assert not server.requests


def test_pictures_that_are_too_much_together_are_refused_by_name(
    client: inkwell.Client, server: InkwellServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inkwell.converters.asking.REQUEST_BYTES_MOST", 4096 + 10)
    client.paint("a cat", image=b"12345", controls=[b"12345"])
    with pytest.raises(inkwell.TooLarge) as raised:
        client.paint("a cat", image=b"12345", controls=[b"123456"])
    assert raised.value.fields[0].field == "controls[0].image"
    assert len(server.requests) == 1


def test_preview_options_ask_for_previews_unless_they_are_declined(
    client: inkwell.Client, server: InkwellServer
) -> None:
    each: list[inkwell.PaintOptions] = [
        {"preview_interval": 2}, {"preview_method": "linear"}, {"preview_max_side_px": 64},
    ]  # fmt: skip
    for options in each:
        client.paint("a cat", **options)
        assert not server.requests[-1].preview.disabled
    client.paint("a cat", previews=False, preview_interval=2)
    assert server.requests[-1].preview.disabled
    steps = [
        event.step
        for event in client.paint_stream("a cat", steps=5, preview_interval=2)
        if isinstance(event, inkwell.Preview)
    ]
    assert steps == [2, 4]


# --- what comes back -----------------------------------------------------------------------------------------------


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_the_parameters_say_all_that_was_asked_for(client: inkwell.Client) -> None:
    pictures = client.paint("an __animal__", **FULL)
    assert [picture.parameters.seed for picture in pictures] == [0, 1]
    assert pictures[0].parameters == inkwell.GenerationParameters(
        model="m", prompt="an cat, ink, wash", negative_prompt="n", width=8, height=16, step_count=20,
        guidance_scale=0, scheduler="ddim", seed=0, prompt_syntax=inkwell.PromptSyntax.PLAIN,
        prompt_template="an __animal__", styles=("ink", "wash"), wildcard_seed=0, image_sha256=sha256(b"photo"),
        strength=0.6,
        inpaint=inkwell.InpaintParameters(sha256(b"mask"), 4, True, 32, inkwell.MaskFill.NOISE),
        outpaint=inkwell.Outpaint(1, 2, 3, 4, 0, "grey"),
        controls=(
            inkwell.ControlParameters("edges", sha256(b"edges"), "canny", 0.8, 0.1, 0.9),
            inkwell.ControlParameters("edges", sha256(b"pose"), "", 1, 0, 1),
        ),
        image_prompts=(inkwell.ImagePromptParameters("ip", sha256(b"style"), 0.3),),
        loras=(inkwell.Lora("flat", -0.5), inkwell.Lora("round"), inkwell.Lora("old", 0)),
        hires=inkwell.Hires(None, 16, 32, "latent", 9, 0.7), refiner=inkwell.Refiner("fine", 0.9),
        sampling=inkwell.Sampling("karras", "trailing", "v_prediction", 0, (999, 500)), guidance_rescale=0,
        perturbed_attention=inkwell.PerturbedAttention(3.5, 0.5), freeu=inkwell.FreeU(0.9, 0.2, 1.5, 1.6),
        clip_skip=0, variation=inkwell.Variation(0, 0.25), vae=inkwell.Vae("sharp", True, True),
    )  # fmt: skip
    for picture in pictures:
        assert inkwell.embedded_parameters(picture.content) == picture.parameters


def test_what_was_not_asked_for_is_none(client: inkwell.Client) -> None:
    (picture,) = client.paint("a cat", sampling=inkwell.Sampling())
    blank = inkwell.GenerationParameters("brush", "a cat", "", 16, 8, 20, 2.5, "euler", 1000)
    blank = dataclasses.replace(blank, prompt_syntax=inkwell.PromptSyntax.WEIGHTED)
    assert picture.parameters == blank
    assert picture.parameters.sampling is None


def test_numbers_come_back_as_they_were_typed(client: inkwell.Client) -> None:
    for value in (7.1, 0.1, 1 / 3, 1e-7, 3.4028235e38):
        (picture,) = client.paint("a cat", guidance_scale=value)
        got = picture.parameters.guidance_scale
        assert len(str(got)) <= 13
        assert got == pytest.approx(value, rel=1e-7)


def test_conditions_come_in_the_order_of_the_controls(client: inkwell.Client) -> None:
    *_, result = client.paint_stream("a cat", controls=[b"b", b"a"])
    assert isinstance(result, inkwell.PaintResult)
    assert result.control_images == (
        inkwell.Image(b"condition of b", "image/png"),
        inkwell.Image(b"condition of a", "image/png"),
    )


# --- again ---------------------------------------------------------------------------------------------------------


def test_options_of_a_picture_paint_it_again(client: inkwell.Client) -> None:
    first = client.paint("an __animal__", **FULL)[1]
    pictures = [b"style", b"mask", b"photo", b"unused", b"edges", b"pose"]
    options = inkwell.repeat_options(first.parameters, pictures)
    again = client.paint(first.parameters.prompt, **options)[0].parameters
    # Wildcards and styles are filled in, so that nothing but their names is lost.
    same = dataclasses.replace(first.parameters, prompt_template="", styles=(), wildcard_seed=None)
    assert again == same


def test_pictures_that_are_missing_are_named(client: inkwell.Client) -> None:
    first = client.paint("a cat", **FULL)[0]
    with pytest.raises(ValueError, match="missing") as raised:
        inkwell.repeat_options(first.parameters, [b"photo", b"edges"])
    for field, content in (("inpaint.mask", b"mask"), ("controls[1].image", b"pose"), ("image_prompts[0]", b"style")):
        assert field in str(raised.value)
        assert sha256(content) in str(raised.value)
    assert sha256(b"photo") not in str(raised.value)


def test_steps_by_hand_are_repeated_by_hand(client: inkwell.Client, server: InkwellServer) -> None:
    (first,) = client.paint("a cat", sampling=inkwell.Sampling(sigmas=(14.6, 3.2)))
    client.paint("a cat", **inkwell.repeat_options(first.parameters))
    assert list(server.requests[-1].sampling.sigmas) == pytest.approx([14.6, 3.2])
    assert not server.requests[-1].HasField("step_count")


# --- asyncio -------------------------------------------------------------------------------------------------------


async def test_the_asyncio_client_sends_the_same(
    aio_client: inkwell.AsyncClient, client: inkwell.Client, server: InkwellServer, tmp_path: Path
) -> None:
    (tmp_path / "photo.png").write_bytes(b"photo")
    options: inkwell.PaintOptions = {**FULL, "image": tmp_path / "photo.png"}
    ours = await aio_client.paint("a cat", **options)
    assert ours == client.paint("a cat", **FULL)
    assert server.requests[0] == server.requests[1]
    with pytest.raises(inkwell.InvalidRequest):  # at once, not when it is first awaited
        aio_client.paint_stream("a cat", prompt_syntax="sdnext")
    with pytest.raises(FileNotFoundError):
        await aio_client.paint("a cat", image="missing.png")
    assert len(server.requests) == 2
