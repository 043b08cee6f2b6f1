"""`inkwell paint`: every option of the request, wrong ones, and pictures repeated from their own file."""

import hashlib
import io
import sys
from pathlib import Path

import pytest
from PIL import Image

import inkwell
from inkwell.cli import main
from inkwell.diffusion.v1 import diffusion_pb2
from tests.unit.inkwell.command import json_lines, line_file
from tests.unit.inkwell.fake_server import InkwellServer

pytestmark = pytest.mark.usefixtures("command_at_server")

FULL = [
    "paint", "a cat", "-o", "cat.png", "--seed", "5",
    "-i", "photo", "--strength", "0.6", "--mask", "mask", "--invert-mask", "--mask-blur", "4", "--inpaint-padding",
    "32", "--fill", "noise",
    "--control", "edges=e,d.png,preprocessor=canny,scale=0.8,end=0.6", "--control", "pose",
    "--image-prompt", "ip=style,scale=0.3", "--image-prompt", "style",
    "--lora", "flat:-0.5", "--lora", "round",
    "--hires", "1.5", "--hires-upscaler", "latent", "--hires-strength", "0.7", "--hires-steps", "9",
    "--refiner", "fine", "--switch-at", "0.9",
    "--sigmas", "karras", "--spacing", "trailing", "--prediction-type", "v_prediction", "--eta", "0",
    "--guidance-rescale", "0.7", "--pag", "3.5", "--pag-adaptive", "0.5", "--freeu", "on",
    "--variation-seed", "0", "--variation-strength", "0.25",
    "--style", "ink", "--style", "wash", "--wildcard-seed", "0", "--plain-prompt", "--clip-skip", "1",
    "--vae", "sharp", "--vae-tiled", "--vae-upcast",
]  # fmt: skip


@pytest.fixture(autouse=True)
def files(command_at_server: None) -> None:
    """What the commands above name."""
    for name in ("photo", "mask", "e,d.png", "pose", "style"):
        line_file(name, f"{name} content")


def shown(text: str) -> str:
    """What an error box says, without the box."""
    return " ".join(text.replace("│", " ").split())


def test_every_option_reaches_the_server(server: InkwellServer) -> None:
    assert main(FULL) == 0
    (request,) = server.requests
    pb = diffusion_pb2
    assert (request.image.content, request.inpaint.mask.content) == (b"photo content", b"mask content")
    assert (request.inpaint.blur_px, request.inpaint.inverted, request.inpaint.crop_padding_px) == (4, True, 32)
    assert request.inpaint.fill == pb.MASK_FILL_NOISE
    edges, pose = request.controls
    assert (edges.model, edges.image.content, edges.preprocessor) == ("edges", b"e,d.png content", "canny")
    assert (edges.scale, edges.end) == pytest.approx((0.8, 0.6))
    assert not edges.HasField("start")
    assert (pose.model, pose.image.content, pose.preprocessor) == ("", b"pose content", "")
    assert not pose.HasField("scale")
    named, bare = request.image_prompts
    assert (named.adapter, named.scale, named.image.content) == ("ip", pytest.approx(0.3), b"style content")
    assert (bare.adapter, bare.HasField("scale")) == ("", False)
    assert [(each.name, each.weight, each.HasField("weight")) for each in request.loras] == [
        ("flat", -0.5, True), ("round", 0, False),
    ]  # fmt: skip
    assert (request.hires.scale, request.hires.upscaler, request.hires.step_count) == (1.5, "latent", 9)
    assert (request.refiner.model, request.refiner.switch_at) == ("fine", pytest.approx(0.9))
    assert request.sampling == pb.Sampling(
        sigma_schedule=pb.SIGMA_SCHEDULE_KARRAS, timestep_spacing=pb.TIMESTEP_SPACING_TRAILING,
        prediction_type=pb.PREDICTION_TYPE_V_PREDICTION, eta=0,
    )  # fmt: skip
    assert request.perturbed_attention == pb.PerturbedAttention(scale=3.5, adaptive_scale=0.5)
    assert request.HasField("freeu")
    assert request.freeu == pb.FreeU()
    assert request.variation == pb.Variation(seed=0, strength=0.25)
    assert request.vae == pb.Vae(name="sharp", tiled=True, upcast=True)
    assert (list(request.styles), request.prompt_syntax) == (["ink", "wash"], pb.PROMPT_SYNTAX_PLAIN)
    assert request.HasField("wildcard_seed")
    assert (request.clip_skip, request.strength) == (1, pytest.approx(0.6))
    assert request.guidance_rescale == pytest.approx(0.7)


def test_other_ways_to_say_it(server: InkwellServer) -> None:
    assert main(["paint", "x", "-o", "x.png", "--hires", "32x24", "--timesteps", "999,500,1"]) == 0
    assert main(["paint", "x", "-o", "x.png", "--sigmas", "14.5,3,0.5", "--freeu", "1,0.5,1.25,1.5"]) == 0
    by_steps, by_noise = server.requests
    assert (by_steps.hires.width, by_steps.hires.height, by_steps.hires.HasField("scale")) == (32, 24, False)
    assert list(by_steps.sampling.timesteps) == [999, 500, 1]
    assert list(by_noise.sampling.sigmas) == [14.5, 3, 0.5]
    assert by_noise.freeu == diffusion_pb2.FreeU(s1=1, s2=0.5, b1=1.25, b2=1.5)


def test_blur_and_fill_speak_of_the_edges_where_there_is_no_mask(server: InkwellServer) -> None:
    arguments = ["-i", "photo", "--outpaint", "8,0,16,0", "--mask-blur", "2", "--fill", "grey"]
    assert main(["paint", "x", "-o", "x.png", *arguments]) == 0
    (request,) = server.requests
    assert request.outpaint == diffusion_pb2.Outpaint(
        left_px=8, right_px=16, blur_px=2, fill=diffusion_pb2.MASK_FILL_GREY
    )
    assert not request.HasField("inpaint")


def test_batches_are_numbered_through(server: InkwellServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paint", "x", "-o", "x.png", "--count", "2", "--batches", "2", "--seed", "1", "-q"]) == 0
    assert capsys.readouterr().out == "x-1.png\nx-2.png\nx-3.png\nx-4.png\n"
    assert (server.requests[0].image_count, server.requests[0].batch_count) == (2, 2)
    assert inkwell.embedded_parameters("x-4.png").seed == 4


def test_a_picture_may_come_from_stdin(server: InkwellServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"piped")))
    assert main(["paint", "x", "-o", "x.png", "-i", "-"]) == 0
    assert server.requests[0].image.content == b"piped"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--image", "missing"], "--image: 'missing' does not exist"),
        (["--mask", "."], "--mask: '.' is a directory"),
        (["-i", "-", "--mask", "-"], "read only once"),
        (["--control", "edges=missing"], "--control: 'missing' does not exist"),
        (["--control", "edges="], "names no file"),
        (["--control", "edges=photo,strength=0.8"], "'strength' is none of preprocessor, scale, start, end"),
        (["--control", "edges=photo,scale=much"], "scale must be a number, not 'much'"),
        (["--control", "edges=photo,scale=1,scale=1"], "sets scale twice"),
        (["--image-prompt", "ip=style,end=1"], "'end' is none of scale"),
        (["--lora", "flat:much"], "'much' is no number"),
        (["--outpaint", "8,8"], "LEFT,TOP,RIGHT,BOTTOM"),
        (["--outpaint", "8,8,8,half"], "whole numbers"),
        (["--hires", "big"], "no factor such as 2, nor WIDTHxHEIGHT"),
        (["--hires-steps", "9"], "--hires-steps: it goes with --hires"),
        (["--switch-at", "0.5"], "--switch-at: it goes with --refiner"),
        (["--mask-blur", "4"], "--mask-blur: it goes with --mask"),
        (["--invert-mask", "--outpaint", "8,8,8,8"], "--invert-mask: it goes with --mask"),
        (["--pag-adaptive", "1"], "--pag-adaptive: it goes with --pag"),
        (["--variation-strength", "1"], "--variation-strength: it goes with --variation-seed"),
        (["--variation-seed", "1"], "--variation-seed: it goes with --variation-strength"),
        (["--sigmas", "cosine"], "none of karras, exponential, beta"),
        (["--timesteps", "999,half"], "whole numbers between commas"),
        (["--timesteps", "999,1", "--steps", "2"], "leave their count out"),
        (["--timesteps", "999,1", "--sigmas", "14,1"], "not both"),
        (["--freeu", "off"], "--freeu"),
        (["--freeu", "1,1"], "S1,S2,B1,B2"),
        (["--fill", "blue"], "blue"),
        (["--preview-method", "full"], "full"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_end_in_2_before_anything_is_sent(
    server: InkwellServer, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert main(["paint", "x", "-o", "x.png", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in shown(err)
    assert not server.requests


def test_what_the_server_refuses_is_told_by_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paint", "x", "-o", "x.png", "--control", f"edges={line_file('bad.png', 'bad')}", "-q"]) == 2
    assert capsys.readouterr().err == "inkwell: controls[0].image.content: not a picture\n  Correct --control.\n"
    assert main(["paint", "x", "-o", "x.png", "--image", "bad.png", "-q"]) == 2
    assert capsys.readouterr().err == "inkwell: image.content: not a picture\n  Correct --image.\n"


# --- again ---------------------------------------------------------------------------------------------------------

AGAIN = [
    "paint", "--like", "cat.png", "-o", "again.png", "-i", "photo", "--mask", "mask", "--control", "e,d.png",
    "--control", "pose", "--image-prompt", "style", "--image-prompt", "style",
]  # fmt: skip


def test_like_repeats_everything_from_the_picture_and_what_went_in(
    server: InkwellServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(FULL) == 0
    assert main([*AGAIN, "-q"]) == 0
    assert capsys.readouterr().err.count("is not the picture") == 0
    first, again = server.requests
    # Defaults are filled in, and so are styles; all else is what was asked for.
    again.ClearField("styles")
    for name in ("width", "height", "step_count", "guidance_scale"):
        again.ClearField(name)
    first.ClearField("styles")
    first.ClearField("wildcard_seed")
    first.prompt, first.model, first.scheduler = "a cat, ink, wash", "brush", "euler"
    first.controls[0].start = 0
    first.controls[1].model = "edges"
    for name, value in (("scale", 1), ("start", 0), ("end", 1)):
        setattr(first.controls[1], name, value)
    first.image_prompts[1].adapter, first.image_prompts[1].scale = "ip", 1
    assert again == first


def test_like_names_the_pictures_that_are_missing(server: InkwellServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(FULL) == 0
    assert main(["paint", "--like", "cat.png", "-o", "again.png", "-i", "photo", "--control", "e,d.png"]) == 2
    err = "".join(capsys.readouterr().err.replace("│", " ").split())
    for what, name in (("--mask", "mask"), ("--controlnumber2", "pose"), ("--image-promptnumber1", "style")):
        digest = hashlib.sha256(f"{name} content".encode()).hexdigest()
        assert f"{what}(SHA-256{digest})" in err
    assert "--image(" not in err
    assert "--controlnumber1" not in err
    assert len(server.requests) == 1


def test_like_tells_which_pictures_are_others(server: InkwellServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(FULL) == 0
    capsys.readouterr()
    swapped = [{"photo": "style", "pose": "mask"}.get(each, each) for each in AGAIN]
    assert main([*swapped, "-q"]) == 0
    notes = capsys.readouterr().err.splitlines()
    assert [note.split(" is not the picture")[0] for note in notes] == [
        "inkwell: --image",
        "inkwell: --control number 2",
    ]
    assert hashlib.sha256(b"photo content").hexdigest() in notes[0]
    assert server.requests[-1].image.content == b"style content"


def test_other_options_override_parts_of_like(server: InkwellServer) -> None:
    assert main(FULL) == 0
    more = ["--hires", "48x32", "--hires-strength", "0.5", "--lora", "round:0.5", "--no-vae-tiled", "--mask-blur", "8",
            "--sigmas", "beta", "--no-plain-prompt", "--switch-at", "0.5"]  # fmt: skip
    changed = ["edges=e,d.png,scale=0.25" if each == "e,d.png" else each for each in AGAIN]
    assert main([*changed, *more, "-q"]) == 0
    request = server.requests[-1]
    assert (request.hires.width, request.hires.height, request.hires.HasField("scale")) == (48, 32, False)
    assert (request.hires.strength, request.hires.upscaler, request.hires.step_count) == (0.5, "latent", 9)
    assert [(each.name, each.weight) for each in request.loras] == [("round", 0.5)]
    assert (request.vae.name, request.vae.tiled, request.vae.upcast) == ("sharp", False, True)
    assert (request.inpaint.blur_px, request.inpaint.inverted) == (8, True)
    assert request.sampling.sigma_schedule == diffusion_pb2.SIGMA_SCHEDULE_BETA
    assert request.sampling.timestep_spacing == diffusion_pb2.TIMESTEP_SPACING_TRAILING
    assert request.prompt_syntax == diffusion_pb2.PROMPT_SYNTAX_WEIGHTED
    assert (request.refiner.model, request.refiner.switch_at) == ("fine", 0.5)
    assert (request.controls[0].scale, request.controls[0].preprocessor) == (0.25, "canny")


def test_a_mask_and_edges_take_the_place_of_one_another(server: InkwellServer) -> None:
    assert main(["paint", "x", "-o", "masked.png", "-i", "photo", "--mask", "mask"]) == 0
    edges = ["--outpaint", "8,8,8,8", "--mask-blur", "2"]
    assert main(["paint", "--like", "masked.png", "-o", "wide.png", "-i", "photo", *edges]) == 0
    assert not server.requests[-1].HasField("inpaint")
    assert server.requests[-1].outpaint.blur_px == 2
    assert main(["paint", "--like", "wide.png", "-o", "wider.png", "-i", "photo", "--mask-blur", "3"]) == 0
    assert (server.requests[-1].outpaint.left_px, server.requests[-1].outpaint.blur_px) == (8, 3)
    assert main(["paint", "--like", "wide.png", "-o", "x.png", "-i", "photo", "--mask", "mask"]) == 0
    assert not server.requests[-1].HasField("outpaint")
    assert server.requests[-1].inpaint.mask.content == b"mask content"


def test_steps_by_hand_and_their_count_take_the_place_of_one_another(server: InkwellServer) -> None:
    assert main(["paint", "x", "-o", "hand.png", "--timesteps", "999,1", "--eta", "0.5"]) == 0
    assert main(["paint", "--like", "hand.png", "-o", "again.png"]) == 0
    assert (list(server.requests[-1].sampling.timesteps), server.requests[-1].step_count) == ([999, 1], 0)
    assert main(["paint", "--like", "hand.png", "-o", "counted.png", "--steps", "3"]) == 0
    assert (list(server.requests[-1].sampling.timesteps), server.requests[-1].step_count) == ([], 3)
    assert server.requests[-1].sampling.eta == 0.5
    assert main(["paint", "--like", "counted.png", "-o", "x.png", "--sigmas", "14,1"]) == 0
    assert (list(server.requests[-1].sampling.sigmas), server.requests[-1].HasField("step_count")) == ([14, 1], False)


def test_a_picture_of_an_earlier_version_is_repeated(server: InkwellServer) -> None:
    values = (
        '{"model": "brush", "prompt": "a cat", "negative_prompt": "", "width": 16, "height": 8, "step_count": 3,'
        ' "guidance_scale": 1.5, "scheduler": "ddim", "seed": 9}'
    )
    exif = Image.Exif()
    exif[0x010E] = values
    Image.new("RGB", (16, 8)).save("old.jpg", exif=exif)
    assert main(["paint", "--like", "old.jpg", "-o", "again.png"]) == 0
    (request,) = server.requests
    assert (request.prompt, request.step_count, request.scheduler, request.seed) == ("a cat", 3, "ddim", 9)
    assert not request.HasField("hires")


def test_json_says_all_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FULL, "--json", "-q"]) == 0
    (value,) = json_lines(capsys.readouterr().out)
    parameters = value["parameters"]
    assert parameters["controls"][0]["preprocessor"] == "canny"
    assert parameters["inpaint"]["fill"] == "noise"
    assert parameters["sampling"]["sigma_schedule"] == "karras"
    assert parameters["image_sha256"] == hashlib.sha256(Path("photo").read_bytes()).hexdigest()
