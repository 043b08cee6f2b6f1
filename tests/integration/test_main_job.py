"""The main job, end to end: services on the embedded models as processes, the gateway in front, SDK and CLI outside."""

import contextlib
import csv
import io
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy
import psutil
import pytest
from PIL import Image, ImageStat
from rapidfuzz.distance import Levenshtein

import inkwell
from services import local
from tests.support.documents import alike, encoded, pdf, written

SAMPLES = local.SAMPLES


@pytest.fixture(scope="module")
def client(fleet: dict[str, local.Service]) -> Iterator[inkwell.Client]:
    with inkwell.Client(fleet["gateway"].address) as opened:
        yield opened


def samples() -> list[tuple[Path, str]]:
    with (SAMPLES / "labels.tsv").open(newline="") as labels:
        return [(SAMPLES / row["file"], row["text"]) for row in csv.DictReader(labels, delimiter="\t")]


def test_the_embedded_samples_are_read(client: inkwell.Client) -> None:
    wrong = sum(Levenshtein.distance(client.read(path).text, text) for path, text in samples())
    assert wrong / sum(len(text) for _, text in samples()) <= 0.2


def test_reading_streams_its_progress(client: inkwell.Client) -> None:
    events = list(client.read_stream(samples()[0][0]))
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    kinds = [type(event).__name__ for event in events]
    assert kinds.index("Started") < kinds.index("Partial") < kinds.index("ReadResult") == len(kinds) - 1
    assert isinstance(events[-1], inkwell.ReadResult)
    assert events[-1].reading.text == client.read(samples()[0][0]).text


def test_many_lines_are_read_over_one_stream(client: inkwell.Client) -> None:
    alone = {str(i): client.read(path).text for i, (path, _) in enumerate(samples())}
    together = dict(client.read_many({str(i): path for i, (path, _) in enumerate(samples())}.items()))
    assert {i: r.text if isinstance(r, inkwell.Reading) else r for i, r in together.items()} == alone


def test_a_document_is_read_in_order_and_exported(client: inkwell.Client, tmp_path: Path) -> None:
    first, second = written(0, 1, 2), written(3, 4)
    (tmp_path / "letter.pdf").write_bytes(pdf([first.image, second.image]))
    seen: list[inkwell.DocumentEvent] = []
    document = client.read_document(
        tmp_path / "letter.pdf", pages="2,1", export=["text", "page-xml", "pdf"], beam_width=2, on_event=seen.append
    )
    assert [page.page for page in document.pages] == [2, 1]
    assert alike([line.text for line in document.lines], [*second.texts, *first.texts])
    assert document.exports["text"].content.decode() == document.text + "\n"
    assert document.exports["page-xml"].media_type == "application/zip"
    assert document.exports["pdf"].content.startswith(b"%PDF")
    assert (document.line_count, document.served_by.pool) == (5, "ocr-local")
    # What came with each line alone is in the whole, too, and the last progress is all of it.
    assert all(line.reading.tokens for line in document.lines)
    progress = [event for event in seen if isinstance(event, inkwell.DocumentProgress)]
    assert (progress[-1].page_done_count, progress[-1].line_done_count) == (2, 5)
    alone = [event.line.text for event in seen if isinstance(event, inkwell.LineRead)]
    assert sorted(alone) == sorted(line.text for line in document.lines)


async def test_the_asyncio_client_reads_the_same_document(
    client: inkwell.Client, fleet: dict[str, local.Service]
) -> None:
    photo = encoded(written(5, 6).image)
    async with inkwell.AsyncClient(fleet["gateway"].address) as aio_client:
        document = await aio_client.read_document(photo)
    assert document.text == client.read_document(photo).text


def test_a_document_that_is_none_is_refused_before_anything_is_read(client: inkwell.Client) -> None:
    with pytest.raises(inkwell.InvalidRequest) as raised:
        client.read_document(b"%PDF-1.7 and then nothing")
    assert raised.value.fields[0].field == "content"
    with pytest.raises(inkwell.InvalidRequest, match="no page 9") as raised:
        client.read_document(pdf([written(0).image]), pages="9")
    assert raised.value.fields[0].field.startswith("page_ranges")


def test_embeddings_of_a_line_are_the_same_alone_and_together(client: inkwell.Client, tmp_path: Path) -> None:
    paths = [path for path, _ in samples()[:3]]
    together = client.embed(paths, normalize=True)
    (width,) = {model.embedding_width for model in client.models("ocr") if isinstance(model, inkwell.OcrModel)}
    assert together.shape == (3, width)
    for row, path in zip(together.numpy(), paths, strict=True):
        assert abs(row - client.embed(path, normalize=True).numpy()[0]).max() < 1e-4
        assert abs((row**2).sum() - 1) < 1e-4
    whole = client.embed(paths[0], pooling="none", dtype="float16").numpy()
    mean = client.embed(paths[0], pooling="mean").numpy()
    assert abs(whole.astype("float32").mean(axis=1) - mean).max() < 1e-2


def test_a_model_that_serves_is_loaded_at_once(client: inkwell.Client) -> None:
    model = client.load_model("handwriting-tiny")
    assert (model.state, model.is_default) == (inkwell.ModelState.READY, True)
    assert model in client.models("ocr")
    assert model.precision is not None
    with pytest.raises(inkwell.NotFound, match="handwriting-tiny"):
        client.load_model("handwriting-huge")


def test_a_picture_is_painted_with_live_progress(client: inkwell.Client) -> None:
    events = list(client.paint_stream("grinning face", seed=7, steps=6, preview_interval=1))
    steps = [event.step for event in events if isinstance(event, inkwell.Progress)]
    previews = [event for event in events if isinstance(event, inkwell.Preview)]
    assert steps == list(range(1, 7))
    assert len(previews) == 5, "after the last step comes the result itself"
    result = events[-1]
    assert isinstance(result, inkwell.PaintResult)
    picture = Image.open(io.BytesIO(result.pictures[0].content))
    assert picture.size == (64, 64)
    # A grinning face is mostly yellow: much red and green, little blue.
    red, green, blue = ImageStat.Stat(picture.convert("RGB")).mean
    assert red > blue + 20
    assert green > blue + 20


def test_the_same_seed_gives_the_same_bytes_and_the_file_repeats_itself(client: inkwell.Client, tmp_path: Path) -> None:
    first = client.paint("red apple", seed=3, steps=4)[0]
    assert client.paint("red apple", seed=3, steps=4)[0].content == first.content
    first.save(tmp_path / "apple.png")
    embedded = inkwell.embedded_parameters(tmp_path / "apple.png")
    assert embedded == first.parameters
    again = client.paint(
        embedded.prompt,
        seed=embedded.seed,
        steps=embedded.step_count,
        guidance_scale=embedded.guidance_scale,
        scheduler=embedded.scheduler,
    )[0]
    assert again.content == first.content


def test_the_fleet_and_its_models_are_listed(client: inkwell.Client) -> None:
    assert {(pool.service, endpoint.state) for pool in client.fleet() for endpoint in pool.endpoints} == {
        ("ocr", inkwell.EndpointState.READY),
        ("diffusion", inkwell.EndpointState.READY),
    }
    assert {model.name for model in client.models()} >= {"handwriting-tiny", "emoji-tiny"}
    assert len(client.schedulers()) >= 10


def test_hardware_preference_is_honoured_or_refused(fleet: dict[str, local.Service]) -> None:
    sample = samples()[0][0]
    address = fleet["gateway"].address
    here = local.hardware_label()
    elsewhere = "rocm" if here != "rocm" else "cuda"
    with inkwell.Client(address, hardware=f"{elsewhere}, {here}") as client:
        assert client.read(sample).text
    with inkwell.Client(address, hardware=f"{elsewhere}!") as client, pytest.raises(inkwell.FailedPrecondition):
        client.read(sample)
    with inkwell.Client(address, hardware="quantum") as client, pytest.raises(inkwell.InvalidRequest, match="quantum"):
        client.read(sample)


def cli(fleet: dict[str, local.Service], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "inkwell", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "INKWELL_ADDRESS": fleet["gateway"].address},
    )


def test_the_command_line_reads_and_paints(fleet: dict[str, local.Service], tmp_path: Path) -> None:
    read = cli(fleet, "read", "--json", *(str(path) for path, _ in samples()[:2]))
    assert read.returncode == 0, read.stderr
    assert len([json.loads(line) for line in read.stdout.splitlines()]) == 2
    picture = tmp_path / "face.webp"
    painted = cli(fleet, "paint", "grinning face", "--steps", "3", "--seed", "1", "-o", str(picture))
    assert painted.returncode == 0, painted.stderr
    assert Image.open(picture).format == "WEBP"
    assert cli(fleet, "read", str(tmp_path / "missing.png")).returncode == 2


def test_the_command_line_reads_documents_and_embeds(
    client: inkwell.Client, fleet: dict[str, local.Service], tmp_path: Path
) -> None:
    letter = tmp_path / "letter.pdf"
    letter.write_bytes(pdf([written(0, 1).image, written(2).image]))
    printed = cli(fleet, "document", str(letter))
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout == client.read_document(letter).text + "\n"
    files = cli(fleet, "document", str(letter), "-f", "text", "-f", "hocr", "-o", str(tmp_path))
    assert files.stdout.splitlines() == [str(tmp_path / "letter.txt"), str(tmp_path / "letter.hocr")]
    assert (tmp_path / "letter.txt").read_text() == printed.stdout
    array = tmp_path / "lines.npy"
    embedded = cli(fleet, "embed", *(str(path) for path, _ in samples()[:2]), "-o", str(array))
    assert embedded.returncode == 0, embedded.stderr
    assert numpy.load(array).shape[0] == 2


def started_with(variable: str) -> list[psutil.Process]:
    """The processes that have this environment variable, all of which others cannot have started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it ended while it was looked at, or is nobody's business
            if variable in process.environ():
                found.append(process)
    return found


def test_the_demo_ends_well_and_leaves_nothing_running() -> None:
    mark = f"DEMO_{uuid.uuid4().hex}"
    command = [sys.executable, "-m", "services.local", "demo"]
    demo = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, mark: "1"})
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert (local.DEMO_OUTPUT / "grinning-face.png").exists()
    assert "build/demo/grinning-face.png" in demo.stdout
    assert started_with(mark) == []
