"""The `inkwell` command: what it prints, writes and ends with."""

import glob
import io
import re
import shlex
import sys
from pathlib import Path

import pytest

import inkwell
from inkwell.cli import main
from inkwell.ocr.v1 import ocr_pb2
from services.kit import faults
from tests.unit.inkwell.command import json_lines, line_file
from tests.unit.inkwell.fake_server import InkwellServer

pytestmark = pytest.mark.usefixtures("command_at_server")


# --- read ----------------------------------------------------------------------------------------------------------


def test_one_image_prints_its_text_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["read", line_file("a.png", "say hello")]) == 0
    assert capsys.readouterr() == ("hello\n", "")


def test_several_images_print_file_and_text_in_the_order_given(capsys: pytest.CaptureFixture[str]) -> None:
    # The first is answered last.
    assert main(["read", line_file("a.png", "last"), line_file("b.png", "say two"), "b.png"]) == 0
    assert capsys.readouterr() == ("a.png\tlast\nb.png\ttwo\nb.png\ttwo\n", "")


def test_stdin_is_a_dash(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"say piped")))
    assert main(["read", "-"]) == 0
    assert capsys.readouterr().out == "piped\n"


def test_alternatives_are_printed_best_first(server: InkwellServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["read", line_file("a.png", "say hello"), "--alternatives", "2"]) == 0
    assert capsys.readouterr().out == "0.9000\thello\n0.2500\tHELLO\n"
    assert server.requests[0].decoding.hypothesis_count == 2
    assert server.requests[0].decoding.beam_width == 4


def test_a_beam_width_that_was_given_stays(server: InkwellServer) -> None:
    image = line_file("a.png", "say a")
    assert main(["read", image, "--alternatives", "2", "--beam-width", "3", "--max-tokens", "9"]) == 0
    assert main(["read", image, "--length-penalty", "-0.5", "--model", "m", "--hardware", "cuda!"]) == 0
    first, second = server.requests
    assert (first.decoding.beam_width, first.decoding.max_new_token_count) == (3, 9)
    assert (second.decoding.length_penalty, second.model) == (-0.5, "m")
    assert server.metadata[1]["inkwell-hardware"] == "cuda!"


def test_json_of_one_image(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["read", line_file("a.png", "say hi"), "--json"]) == 0
    (value,) = json_lines(capsys.readouterr().out)
    assert value == {
        "file": "a.png",
        "text": "hi",
        "confidence": 0.6,
        "confidence_calibrated": True,
        "log_probability": -0.5,
        "truncated": False,
        "repetition_suspected": False,
        "blank": False,
        "tokens": [
            {"id": 0, "text": "h", "log_probability": -0.25, "confidence": 0.75},
            {"id": 1, "text": "i", "log_probability": -0.25, "confidence": 0.75},
        ],
        "alternatives": [{"text": "HI", "confidence": 0.25, "log_probability": -2.0, "score": -0.5}],
        "timing": {"queue_ms": 1.5, "engine_ms": 20.0},
        "served_by": {
            "model": "pen", "model_version": "", "hardware": "cpu", "runtime": "torch", "pool": "pool-a",
            "endpoint": "10.0.0.1:1",
        },
    }  # fmt: skip


def test_some_of_several_failing_ends_in_1(capsys: pytest.CaptureFixture[str]) -> None:
    files = [line_file("a.png", "say a"), line_file("b.png", "bad"), line_file("c.png", "say c")]
    assert main(["read", *files]) == 1
    out, err = capsys.readouterr()
    assert out == "a.png\ta\nc.png\tc\n"
    assert "b.png: image.content: not a picture" in err
    assert "Traceback" not in err


def test_json_has_a_line_for_failures_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["read", "--json", line_file("a.png", "say a"), line_file("b.png", "bad")]) == 1
    good, bad = json_lines(capsys.readouterr().out)
    assert good["text"] == "a"
    assert bad["file"] == "b.png"
    assert bad["error"]["code"] == "INVALID_ARGUMENT"
    assert bad["error"]["reason"] == "BAD_IMAGE"
    assert bad["error"]["fields"][0]["field"] == "image.content"
    assert main(["read", "--json", "b.png"]) == 2
    assert json_lines(capsys.readouterr().out)[0]["error"]["reason"] == "BAD_IMAGE"


def test_what_was_read_before_a_stream_broke_is_printed(
    server: InkwellServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.break_batch_after = 2
    files = [line_file("a.png", "say a"), line_file("b.png", "say b"), line_file("c.png", "say c")]
    assert main(["read", *files]) == 4
    out, err = capsys.readouterr()
    assert out == "a.png\ta\nb.png\tb\n"
    assert "the engine ended" in err


def test_a_text_that_was_cut_off_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["read", line_file("a.png", "truncated")]) == 0
    assert "--max-tokens" in capsys.readouterr().err


def test_doubtful_readings_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["read", line_file("a.png", "blank"), line_file("b.png", "say again and again")]) == 0
    out, err = capsys.readouterr()
    assert out == "a.png\t\nb.png\tagain and again\n"
    assert "a.png: no writing was found" in err
    assert "b.png: likely wrong" in err


def test_all_options_of_reading_reach_the_server(server: InkwellServer) -> None:
    options = ["--language", "fr", "-l", "de-AT", "--no-repeat", "3", "--early-stopping", "never"]
    assert main(["read", line_file("a.png", "say a"), *options]) == 0
    (request,) = server.requests
    assert list(request.language_hints) == ["fr", "de-AT"]
    assert request.decoding.no_repeat_ngram_size == 3
    assert request.decoding.early_stopping == ocr_pb2.EARLY_STOPPING_NEVER


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Missing argument"),
        (["missing.png"], "'missing.png' does not exist"),
        (["."], "is a directory"),
        (["-", "-"], "only once"),
        (["a.png", "--beam-width", "wide"], "--beam-width"),
        (["a.png", "--nonsense"], "--nonsense"),
    ],
)
def test_wrong_usage_ends_in_2_before_anything_is_sent(
    server: InkwellServer, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    line_file("a.png", "say a")
    assert main(["read", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in " ".join(err.split())
    assert not server.requests


# --- lists ---------------------------------------------------------------------------------------------------------


def test_the_fleet_is_a_line_an_endpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fleet"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert rows[0][:6] == ["POOL", "SERVICE", "HARDWARE", "ENDPOINT", "STATE", "VERSION"]
    assert rows[1] == ["ocr-cpu", "ocr", "cpu", "10.0.0.1:50051", "ready", "0.1.0", "2", "40", "0", ""]
    assert rows[2][4:] == ["unreachable", "", "0", "7", "3", "connection refused"]
    assert rows[3][:5] == ["paint-cuda", "diffusion", "cuda", "dns:///paint:50052", "no endpoint"]


def test_the_fleet_may_be_narrowed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fleet", "--service", "ocr", "--hardware", "cpu", "--json"]) == 0
    (pool,) = json_lines(capsys.readouterr().out)
    assert pool["name"] == "ocr-cpu"
    assert pool["endpoints"][1]["state"] == "unreachable"


def test_models_and_schedulers_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert [line.split("\t")[:3] for line in out.splitlines()[1:]] == [
        ["pen", "ocr", "ready"],
        ["brush", "diffusion", "loading"],
    ]
    assert [line.split("\t")[5:9] for line in out.splitlines()] == [
        ["PRECISION", "PARAMETERS", "MEMORY", "DEFAULT"],
        ["int8_dynamic", "7,000,000", "7.5 MB", "yes"],
        ["bfloat16", "9,000,000", "18.0 MB", "yes"],
    ]
    assert main(["models", "--json"]) == 0
    reader, painter = json_lines(capsys.readouterr().out)
    assert (reader["service"], reader["default_decoding"]["beam_width"]) == ("ocr", 4)
    assert (painter["service"], painter["default_guidance_scale"]) == ("diffusion", 2.5)
    assert main(["schedulers"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "euler\tEULER\tEuler, euler a\tTake euler."
    assert main(["schedulers", "--json"]) == 0
    euler, ddim = json_lines(capsys.readouterr().out)
    assert (euler["name"], euler["aliases"], ddim["sampling_options"]) == ("euler", ["Euler", "euler a"], ["eta"])


def test_adapters_and_controls_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters"]) == 0
    assert [line.split("\t") for line in capsys.readouterr().out.splitlines()] == [
        ["ADAPTER", "KIND", "SIZE", "MODELS"],
        ["flat", "lora", "1.5 MB", "brush"],
        ["<cat>", "textual inversion", "", "not said"],
        ["ip", "image prompt", "", "brush, other"],
        ["later", "unknown", "", "not said"],
    ]
    assert main(["adapters", "--json"]) == 0
    assert json_lines(capsys.readouterr().out)[0]["models"] == ["brush"]
    assert main(["controls"]) == 0
    assert [line.split("\t") for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["edges", "controlnet", "canny", "brush", ""],
        ["sketch", "t2i adapter", "", "not said", ""],
        ["canny", "preprocessor", "", "", "Thin lines along edges."],
    ]
    assert main(["controls", "--json"]) == 0
    assert [each["kind"] for each in json_lines(capsys.readouterr().out)] == [
        "controlnet", "t2i_adapter", "preprocessor",
    ]  # fmt: skip


def test_models_of_one_service_are_shown_though_the_other_fails(
    server: InkwellServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fail_next.append(faults.failed_precondition("NO_POOL", "no pool reads"))
    assert main(["models"]) == 7
    out, err = capsys.readouterr()
    assert [line.split("\t")[0] for line in out.splitlines()] == ["MODEL", "brush"]
    assert "models of ocr: no pool reads" in err


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"inkwell {inkwell.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["read", "--help"], ["paint", "-h"], ["fleet", "-h"], ["models", "load", "-h"]]
)
def test_help_tells_the_exit_codes(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Exit codes: 0 done; 1 some of several" in out
    assert "130 interrupted" in out


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        (faults.invalid_field("decoding.beam_width", "99 is not within 1 to 16"), 2, "Correct --beam-width."),
        (faults.invalid_field("language_hints[0]", "'x y' is no tag"), 2, "Correct --language."),
        (faults.invalid_field("hires.width, hires.height", "set both or none"), 2, "Correct --hires."),
        (faults.invalid_field("controls[1].model", "no such control"), 2, "Correct --control."),
        (faults.invalid_field("inpaint.mask", "not as large as image"), 2, "Correct --mask."),
        (faults.not_found("model", "x", ["pen"], field="model"), 3, "`inkwell models`"),
        (faults.unavailable("LOADING", "the model loads", retry_after_ms=10), 4, "Try again in 0.01 s"),
        (faults.overloaded("QUEUE_FULL", "256 wait", retry_after_ms=1500), 5, "Try again in 1.5 s"),
        (faults.deadline_too_short("needs 4 s"), 6, "--timeout"),
        (faults.failed_precondition("NO_HARDWARE", "no cuda here"), 7, "`inkwell fleet`"),
        (faults.too_large("image.content", "TOO_LARGE", "too many pixels"), 2, "Send less"),
        (faults.internal("a defect"), 1, "log"),
    ],
)
def test_every_error_has_its_exit_code_and_says_what_to_do(
    server: InkwellServer, capsys: pytest.CaptureFixture[str], fault: faults.Fault, code: int, says: str
) -> None:
    server.fail_next.extend([fault] * 4)
    assert main(["read", line_file("a.png", "say a")]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"inkwell: {fault.data.message}\n")
    assert says in err
    assert "Traceback" not in err


def test_an_unreachable_server_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fleet", "--address", "127.0.0.1:1"]) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert "cannot reach 127.0.0.1:1" in err
    assert "Check the address" in err
    assert main(["fleet", "--address", "127.0.0.1:1", "--wait", "0.1"]) == 4
    assert "no connection within 0.1 s" in capsys.readouterr().err


def test_a_timeout_ends_in_6(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["read", line_file("a.png", "hold"), "--timeout", "0.2"]) == 6
    assert "--timeout" in capsys.readouterr().err


def test_hardware_that_no_header_can_carry_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["read", line_file("a.png", "say a"), "--hardware", "cüda"]) == 2
    assert "Correct --hardware." in capsys.readouterr().err


# --- docs ----------------------------------------------------------------------------------------------------------


def test_every_command_in_its_page_works(server: InkwellServer, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "cli.md").read_text()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"say piped")))
    for name in ("line.png", "letter.pdf", "scan.tiff", "photo.jpg", "mask.jpg", "sketch.jpg", "style.jpg"):
        line_file(name, "say a" if name == "line.png" else "a\fb\fc\fd\fe\ff\fg")
    Path("out").mkdir()
    server.reader, server.painter = "handwriting-tiny", "emoji-tiny"
    server.schedulers_known = ("euler", "DPM++ 2M")
    ran = 0
    for line in re.findall(r"^    (?:cat \S+ \| )?inkwell (.*)$", page, flags=re.MULTILINE):
        words = shlex.split(re.split(r" [|>] ", line)[0], comments=True)
        files = [name for word in words for name in (sorted(glob.glob(word)) if "*" in word else [word])]
        # Compiling takes a compiler, which tests/integration/test_compiler.py has. Here, whether the words are taken.
        compiling = words[0] in ("compile", "artifacts", "use")
        assert main([*files, "--help"] if compiling else files) == 0, line
        ran += 1
    assert ran >= 20
