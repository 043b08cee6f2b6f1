"""`inkwell document`: what it prints, writes and ends with."""

import io
import os
import sys
from pathlib import Path

import pytest

from inkwell.cli import main
from inkwell.ocr.v1 import ocr_pb2
from services.kit import faults
from tests.unit.inkwell.command import json_lines, line_file
from tests.unit.inkwell.fake_server import InkwellServer

pytestmark = pytest.mark.usefixtures("command_at_server")

LETTER = "Dear Ada,\nall is well.\n\nYours\fP.S.\n?"


def test_the_text_is_printed_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["document", line_file("a.pdf", LETTER)]) == 0
    assert capsys.readouterr() == ("Dear Ada,\nall is well.\n\nYours\n\fP.S.\n?\n", "")


def test_pages_without_writing_keep_their_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["document", line_file("a.pdf", "\fa\f\fb"), "-f", "text"]) == 0
    assert capsys.readouterr().out == "\fa\n\f\fb\n"
    assert main(["document", line_file("a.pdf", "")]) == 0
    assert capsys.readouterr() == ("", "inkwell: no writing was found\n")


def test_stdin_is_a_dash(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"piped")))
    assert main(["document", "-"]) == 0
    assert capsys.readouterr().out == "piped\n"


def test_all_options_reach_the_server(server: InkwellServer) -> None:
    options = {
        "--pages": "2-,1", "--dpi": "300", "--orientation": "90", "--min-confidence": "0.25", "--model": "m",
        "--language": "fr", "--beam-width": "3", "--length-penalty": "0.5", "--max-tokens": "9", "--no-repeat": "2",
        "--early-stopping": "first", "--hardware": "cuda",
    }  # fmt: skip
    arguments = [part for pair in options.items() for part in pair]
    assert main(["document", line_file("a.pdf", "a\fb"), *arguments]) == 0
    assert main(["document", "a.pdf"]) == 0
    request, plain = server.requests
    assert [(each.first_page, each.last_page) for each in request.page_ranges] == [(2, 0), (1, 1)]
    assert (request.dpi, request.orientation, request.min_confidence) == (300, ocr_pb2.PAGE_ORIENTATION_90, 0.25)
    assert (request.model, list(request.language_hints)) == ("m", ["fr"])
    decoding = request.decoding
    assert (decoding.beam_width, decoding.length_penalty, decoding.max_new_token_count) == (3, 0.5, 9)
    assert (decoding.no_repeat_ngram_size, decoding.early_stopping) == (2, ocr_pb2.EARLY_STOPPING_FIRST)
    assert server.metadata[0]["inkwell-hardware"] == "cuda"
    assert [field.name for field, _ in plain.ListFields()] == ["content"]


def test_lines_left_out_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["document", line_file("a.pdf", LETTER), "--min-confidence", "0.5"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\fP.S.\n")
    assert err == "inkwell: left out for --min-confidence: 1 line\n"


def test_json_is_a_line_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["document", line_file("a.pdf", LETTER), "--json"]) == 0
    first, second = json_lines(capsys.readouterr().out)
    assert (first["file"], first["page"], first["width"], first["rotation"]) == ("a.pdf", 1, 800, 90)
    assert first["text"] == "Dear Ada,\nall is well.\n\nYours"
    line = first["lines"][1]
    assert line["polygon"] == [[10, 80], [400, 80], [400, 110.5], [10, 110.5]]
    assert (line["order"], line["block"], line["text"], line["confidence"]) == (2, 1, "all is well.", 0.75)
    assert second["lines"][1]["confidence"] == 0.125


def test_a_file_to_stdout_is_its_bytes(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main(["document", line_file("a.pdf", "a"), "--format", "hocr"]) == 0
    assert capsysbinary.readouterr() == (b"<EXPORT_FORMAT_HOCR> of a", b"")


@pytest.mark.parametrize(
    ("output", "formats", "kind"),
    [
        ("out.txt", [], "TEXT"),
        ("out.json", [], "JSON"),
        ("out.hocr", [], "HOCR"),
        ("out.PDF", [], "SEARCHABLE_PDF"),
        ("out.zip", [], "PAGE_XML"),
        ("out.xml", ["--format", "alto"], "ALTO"),
        ("out", ["-f", "page-xml"], "PAGE_XML"),
    ],
)
def test_one_file_is_what_its_name_or_the_format_says(
    capsys: pytest.CaptureFixture[str], output: str, formats: list[str], kind: str
) -> None:
    assert main(["document", line_file("a.pdf", "a"), "-o", output, *formats]) == 0
    assert capsys.readouterr() == (f"{output}\n", "")
    assert Path(output).read_text() == f"<EXPORT_FORMAT_{kind}> of a"


def test_several_files_go_to_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    formats = [part for name in ("text", "json", "hocr", "alto", "page-xml", "pdf") for part in ("-f", name)]
    assert main(["document", line_file("letter.pdf", "a"), "-o", "out", *formats]) == 0
    names = ["letter.txt", "letter.json", "letter.hocr", "letter.alto.xml", "letter.page.xml", "letter.pdf"]
    assert capsys.readouterr().out.splitlines() == [os.path.join("out", name) for name in names]
    assert sorted(path.name for path in Path("out").iterdir()) == sorted(names)
    assert main(["document", line_file("many.pdf", "a\fb"), "-o", "out/", "-f", "page-xml", "--json"]) == 0
    (value,) = json_lines(capsys.readouterr().out)
    assert (value["file"], value["format"]) == (os.path.join("out", "many.page.zip"), "page-xml")
    assert (value["media_type"], value["size_bytes"]) == ("application/zip", Path(value["file"]).stat().st_size)


def test_errors_say_what_to_correct(server: InkwellServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["document", line_file("a.pdf", "bad"), "--json"]) == 2
    out, err = capsys.readouterr()
    assert json_lines(out)[0]["error"]["reason"] == "BAD_FILE"
    assert "no PDF" in err
    server.fail_next.append(faults.invalid_field("page_ranges[0].last_page", "the document has 3 pages"))
    assert main(["document", "a.pdf", "--pages", "9"]) == 2
    assert "Correct --pages." in capsys.readouterr().err
    assert main(["document", "a.pdf", "--pages", "all"]) == 2
    assert "Correct --pages." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Missing argument"),
        (["missing.pdf"], "'missing.pdf' does not exist"),
        (["."], "is a directory"),
        (["a.pdf", "--format", "docx"], "docx"),
        (["a.pdf", "--orientation", "45"], "--orientation"),
        (["a.pdf", "-f", "hocr", "-f", "pdf"], "several formats need a folder"),
        (["a.pdf", "-f", "hocr", "-f", "pdf", "-o", "out.pdf"], "several formats need a folder"),
        (["a.pdf", "-f", "hocr", "--json"], "both a file and --json"),
        (["a.pdf", "-o", "out.xml"], "is not clear"),
        (["a.pdf", "-o", "nowhere/out.txt"], "there is no directory 'nowhere'"),
        (["a.pdf", "-o", "nowhere/"], "there is no directory 'nowhere'"),
        (["a.pdf", "-o", "a.pdf"], "the document itself"),
        (["a.pdf", "-o", ".", "-f", "pdf"], "the document itself"),
    ],
)
def test_wrong_usage_ends_in_2_before_anything_is_sent(
    server: InkwellServer, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    line_file("a.pdf", "a")
    assert main(["document", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in " ".join(err.replace("│", " ").split())
    assert not server.requests
    assert Path("a.pdf").read_text() == "a"


def test_a_file_that_cannot_be_written_ends_in_1(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out/a.hocr").mkdir(parents=True)
    assert main(["document", line_file("a.pdf", "a"), "-o", "out", "-f", "text", "-f", "hocr"]) == 1
    out, err = capsys.readouterr()
    assert out == f"{os.path.join('out', 'a.txt')}\n"
    assert "cannot write" in err
