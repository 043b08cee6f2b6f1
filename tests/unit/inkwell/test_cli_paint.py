"""`inkwell paint`: what it prints, writes and ends with."""

from pathlib import Path

import pytest
from PIL import Image

import inkwell
from inkwell.cli import main
from tests.unit.inkwell.command import json_lines
from tests.unit.inkwell.fake_server import InkwellServer

pytestmark = pytest.mark.usefixtures("command_at_server")


def test_paint_writes_the_picture_and_prints_its_path(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paint", "a cat", "-o", "cat.png", "--seed", "7", "--steps", "20"]) == 0
    out, err = capsys.readouterr()
    assert out == "cat.png\n"
    assert inkwell.embedded_parameters("cat.png").seed == 7
    assert err.splitlines()[:2] == [
        "inkwell: queued, 3 before this one",
        "inkwell: started: brush on cpu (torch)",
    ]
    # A line for every tenth of the steps, not for every step.
    assert [line.split(",")[0] for line in err.splitlines()[2:]] == [
        f"inkwell: step {step}/20" for step in range(2, 21, 2)
    ]


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paint", "a cat", "-o", "cat.png", "-q"]) == 0
    assert capsys.readouterr() == ("cat.png\n", "")


@pytest.mark.parametrize(
    ("name", "format_"), [("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.webp", "WEBP")]
)
def test_the_extension_decides_the_format(name: str, format_: str) -> None:
    assert main(["paint", "a cat", "-o", name]) == 0
    with Image.open(name) as image:
        assert image.format == format_


def test_several_pictures_are_numbered(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paint", "a cat", "-o", "cat.webp", "--count", "3", "--seed", "1"]) == 0
    assert capsys.readouterr().out == "cat-1.webp\ncat-2.webp\ncat-3.webp\n"
    assert [inkwell.embedded_parameters(f"cat-{i}.webp").seed for i in (1, 2, 3)] == [1, 2, 3]


def test_all_options_reach_the_server(server: InkwellServer) -> None:
    options = {
        "--negative": "n", "--steps": "3", "--size": "32x24", "--guidance": "0", "--scheduler": "ddim", "--seed": "0",
        "--model": "m", "--quality": "80", "--hardware": "rocm",
    }  # fmt: skip
    arguments = [part for pair in options.items() for part in pair]
    assert main(["paint", "a cat", "-o", "cat.jpg", *arguments]) == 0
    (request,) = server.requests
    assert (request.prompt, request.negative_prompt, request.model, request.scheduler) == ("a cat", "n", "m", "ddim")
    assert (request.width, request.height, request.step_count) == (32, 24, 3)
    assert (request.guidance_scale, request.seed, request.output.quality) == (0.0, 0, 80)
    assert request.HasField("guidance_scale")
    assert request.HasField("seed")
    assert request.preview.disabled  # nobody watches
    assert server.metadata[0]["inkwell-hardware"] == "rocm"


def test_json_of_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paint", "a cat", "-o", "cat.png", "--json", "--seed", "7"]) == 0
    (value,) = json_lines(capsys.readouterr().out)
    assert value["file"] == "cat.png"
    assert value["media_type"] == "image/png"
    assert value["size_bytes"] == Path("cat.png").stat().st_size
    assert value["parameters"]["seed"] == 7
    assert value["parameters"]["step_count"] == 20
    assert value["timing"] == {"queue_ms": 0.5, "engine_ms": 2000.0}
    assert value["served_by"]["runtime"] == "torch"


@pytest.mark.parametrize("name", ["cat.png", "cat.jpg", "cat.webp"])
def test_like_repeats_a_picture_byte_for_byte(name: str) -> None:
    options = ["--seed", "5", "--steps", "7", "--size", "24x16", "--guidance", "1.25", "--scheduler", "ddim", "-n", "x"]
    assert main(["paint", "ein Käse 🧀", *options, "-o", name]) == 0
    again = f"again{Path(name).suffix}"
    assert main(["paint", "--like", name, "-o", again]) == 0
    assert Path(again).read_bytes() == Path(name).read_bytes()


def test_other_options_override_like() -> None:
    assert main(["paint", "a cat", "--seed", "5", "--steps", "7", "-n", "x", "-o", "cat.png"]) == 0
    assert main(["paint", "a dog", "--like", "cat.png", "--seed", "6", "-n", "", "-o", "dog.png"]) == 0
    cat, dog = inkwell.embedded_parameters("cat.png"), inkwell.embedded_parameters("dog.png")
    assert (dog.prompt, dog.seed, dog.negative_prompt) == ("a dog", 6, "")
    assert (dog.step_count, dog.guidance_scale, dog.width) == (cat.step_count, cat.guidance_scale, cat.width)


def test_a_dash_writes_the_picture_to_stdout(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main(["paint", "a cat", "-o", "-"]) == 0
    assert inkwell.embedded_parameters(capsysbinary.readouterr().out).prompt == "a cat"


def test_warnings_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paint", "long " * 100, "-o", "cat.png", "-q"]) == 0
    assert "cut off after 77 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a cat"], "--output"),
        (["-o", "cat.png"], "PROMPT"),
        (["a cat", "-o", "cat.gif"], "must end in one of: .png"),
        (["a cat", "-o", "cat"], "must end in one of: .png"),
        (["a cat", "-o", "nowhere/cat.png"], "there is no directory 'nowhere'"),
        (["a cat", "-o", "folder.png"], "is a directory"),
        (["a cat", "-o", "cat.png", "--size", "64"], "WIDTHxHEIGHT"),
        (["a cat", "-o", "-", "--count", "2"], "one picture"),
        (["a cat", "-o", "-", "--json"], "--json"),
        (["-o", "cat.png", "--like", "missing.png"], "No such file"),
        (["-o", "cat.png", "--like", "plain.png"], "no parameters of Inkwell"),
    ],
)
def test_wrong_painting_ends_in_2_before_anything_is_sent(
    server: InkwellServer, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    Path("folder.png").mkdir()
    Image.new("RGB", (4, 4)).save("plain.png")
    assert main(["paint", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in " ".join(err.replace("│", " ").split())
    assert not server.requests


def test_a_picture_that_cannot_be_written_ends_in_1(capsys: pytest.CaptureFixture[str]) -> None:
    Path("cat-2.png").mkdir()
    assert main(["paint", "a cat", "-o", "cat.png", "--count", "2", "-q"]) == 1
    out, err = capsys.readouterr()
    assert out == "cat-1.png\n"
    assert "cannot write cat-2.png" in err
