"""`inkwell models load`, `inkwell models unload` and `inkwell embed`."""

import io
import sys
from pathlib import Path

import pytest

from inkwell.cli import embedding, main
from inkwell.diffusion.v1 import diffusion_pb2
from inkwell.ocr.v1 import ocr_pb2
from services.kit import faults
from tests.unit.inkwell.command import json_lines, line_file
from tests.unit.inkwell.fake_server import InkwellServer

pytestmark = pytest.mark.usefixtures("command_at_server")


def test_a_model_is_loaded(server: InkwellServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "load", "pen", "--precision", "int8_weight_only", "--hardware", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert out == "pen is ready on cpu (int8_weight_only, 7.5 MB, 1.2 s)\n"
    assert err == "inkwell: unloaded to make room: old, older\n"
    assert server.requests[-1].precision == ocr_pb2.PRECISION_INT8_WEIGHT_ONLY
    assert server.metadata[-1]["inkwell-hardware"] == "cpu"
    assert main(["models", "load", "pen", "--json"]) == 0
    (value,) = json_lines(capsys.readouterr().out)
    assert (value["name"], value["precision"], value["elapsed_ms"]) == ("pen", "float32", 1234)
    assert value["evicted_models"] == ["old", "older"]


def test_a_model_is_loaded_from_an_artifact(server: InkwellServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "load", "pen", "--artifact", "0123456789ab", "--runtime", "openvino"]) == 0
    assert capsys.readouterr().out == "pen is ready on cpu (openvino, float32, 7.5 MB, 1.2 s)\n"
    assert server.requests[-1].artifact == "0123456789ab"
    assert main(["models", "load", "pen", "--artifact", "0123456789ab", "--json"]) == 0
    (value,) = json_lines(capsys.readouterr().out)
    assert value["artifact"] == "0123456789ab"


def test_a_model_is_unloaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "unload", "pen"]) == 0
    assert capsys.readouterr() == ("pen is unloaded\n", "")
    assert main(["models", "unload", "pen", "--json"]) == 0
    (value,) = json_lines(capsys.readouterr().out)
    assert (value["state"], value["precision"]) == ("unloaded", None)


def test_a_model_that_paints_is_found_loaded_and_unloaded(
    server: InkwellServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "load", "brush"]) == 0
    out, err = capsys.readouterr()
    assert out == "brush is ready on cpu (bfloat16, 18.0 MB)\n"
    assert err == "inkwell: unloaded to make room: old\n"
    assert isinstance(server.requests[-1], diffusion_pb2.LoadModelRequest)
    assert main(["models", "unload", "brush"]) == 0
    assert capsys.readouterr().out == "brush is unloaded\n"
    assert main(["models", "load", "brush", "--json"]) == 0
    (value,) = json_lines(capsys.readouterr().out)
    assert (value["name"], value["state"], value["evicted_models"]) == ("brush", "ready", ["old"])


def test_no_list_is_asked_for_where_the_service_is_said(
    server: InkwellServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "load", "brush", "--service", "diffusion"]) == 0
    assert main(["models", "unload", "pen", "--service", "ocr"]) == 0
    assert [type(request) for request in server.requests] == [
        diffusion_pb2.LoadModelRequest,
        ocr_pb2.UnloadModelRequest,
    ]
    assert main(["models", "load", "pen", "--service", "diffusion"]) == 3
    assert "brush" in capsys.readouterr().err


def test_a_name_that_both_services_have_is_not_guessed(
    server: InkwellServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.painter = "pen"
    assert main(["models", "unload", "pen"]) == 2
    assert "ocr and diffusion have a model 'pen'" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert main(["models", "unload", "pen", "--service", "diffusion"]) == 0


def test_a_service_that_cannot_be_asked_matters_only_when_the_other_has_no_such_model(
    server: InkwellServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fail_next.append(faults.failed_precondition("NO_POOL", "no pool reads"))
    assert main(["models", "load", "brush"]) == 0
    server.fail_next.append(faults.failed_precondition("NO_POOL", "no pool reads"))
    assert main(["models", "load", "nothing"]) == 7
    assert "no pool reads" in capsys.readouterr().err


def test_a_model_that_there_is_not_ends_in_3(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "load", "nothing"]) == 3
    assert main(["models", "unload", "nothing"]) == 3
    err = capsys.readouterr().err
    assert "`inkwell models`" in err
    assert err.count("known: pen, brush") == 2


def test_a_model_that_paints_has_no_precision_to_choose(
    server: InkwellServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "load", "brush", "--service", "diffusion", "--precision", "float16"]) == 2
    assert "Correct --precision." in capsys.readouterr().err
    assert not server.requests


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["load"], "Missing argument"),
        (["load", "pen", "--precision", "int4"], "int4"),
        (["load", "pen", "--service", "gateway"], "gateway"),
        (["--json", "load", "pen"], "--json: give it after 'load'"),
        (["--timeout", "5", "unload", "pen"], "--timeout: give it after 'unload'"),
        (["lode", "pen"], "lode"),
    ],
)
def test_wrong_usage_of_models_ends_in_2_before_anything_is_sent(
    server: InkwellServer, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert main(["models", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in " ".join(err.replace("│", " ").split())
    assert not server.requests


# --- embed ---------------------------------------------------------------------------------------------------------


def test_images_become_json_lines_in_the_order_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embed", line_file("a.png", "x"), line_file("b.png", "four")]) == 0
    first, second = json_lines(capsys.readouterr().out)
    assert first == {"file": "a.png", "model": "pen", "dtype": "float32", "embedding": [1, 1.25, 1.5, 1.75]}
    assert (second["file"], second["embedding"]) == ("b.png", [4, 4.25, 4.5, 4.75])


def test_images_become_an_array(server: InkwellServer, capsys: pytest.CaptureFixture[str]) -> None:
    numpy = pytest.importorskip("numpy")
    files = [line_file(f"{number}.png", "x" * (number + 1)) for number in range(embedding.GROUP_IMAGES + 3)]
    assert main(["embed", *files, "-o", "lines.npy", "--dtype", "float16", "--pooling", "cls", "--normalize"]) == 0
    assert capsys.readouterr() == ("lines.npy\n", "")
    array = numpy.load("lines.npy")
    assert (array.shape, array.dtype.name) == ((len(files), 4), "float16")
    assert array[:, 0].tolist() == list(range(1, len(files) + 1))
    # So many images go with several calls, all asking for the same.
    assert [len(request.images) for request in server.requests] == [embedding.GROUP_IMAGES, 3]
    assert {(request.pooling, request.normalize) for request in server.requests} == {(ocr_pb2.POOLING_CLS, True)}
    assert main(["embed", *files, "-o", "lines.npy", "--pooling", "none", "--json"]) == 0
    (value,) = json_lines(capsys.readouterr().out)
    assert value == {"file": "lines.npy", "model": "pen", "dtype": "float32", "shape": [len(files), 3, 4]}
    assert numpy.load("lines.npy").shape == (len(files), 3, 4)


def test_large_images_go_with_fewer_others(server: InkwellServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "GROUP_BYTES", 10)
    files = [
        line_file("a.png", "x" * 6),
        line_file("b.png", "x" * 4),
        line_file("c.png", "x"),
        line_file("d", "x" * 11),
    ]
    assert main(["embed", *files]) == 0
    assert [len(request.images) for request in server.requests] == [2, 1, 1]


def test_a_dash_is_stdin_and_stdout(
    monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    numpy = pytest.importorskip("numpy")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"piped")))
    assert main(["embed", "-", "-o", "-"]) == 0
    assert numpy.load(io.BytesIO(capsysbinary.readouterr().out)).tolist() == [[5, 5.25, 5.5, 5.75]]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Missing argument"),
        (["missing.png"], "does not exist"),
        (["a.png", "--pooling", "max"], "max"),
        (["a.png", "--dtype", "int8"], "int8"),
        (["a.png", "-o", "a.csv"], "must end in .npy"),
        (["a.png", "-o", "nowhere/a.npy"], "there is no directory 'nowhere'"),
        (["a.png", "-o", "folder.npy"], "is a directory"),
        (["a.png", "-o", "-", "--json"], "both the array and --json"),
    ],
)
def test_wrong_embedding_ends_in_2_before_anything_is_sent(
    server: InkwellServer, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    line_file("a.png", "x")
    Path("folder.npy").mkdir()
    assert main(["embed", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in " ".join(err.replace("│", " ").split())
    assert not server.requests


def test_a_bad_image_is_named_ends_in_2_and_leaves_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    files = [line_file("a.png", "x"), line_file("b.png", "bad")]
    assert main(["embed", *files, "-o", "lines.npy"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "inkwell: b.png: images[1].content: not a picture\n  Correct IMAGE.\n"
    assert not Path("lines.npy").exists()
    assert main(["embed", *files]) == 2
    (value,) = json_lines(capsys.readouterr().out)
    assert (value["file"], value["error"]["reason"]) == ("b.png", "BAD_IMAGE")
