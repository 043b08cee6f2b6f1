"""The main job, end to end: services on the embedded models as processes, the gateway in front, SDK and CLI outside."""

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image, ImageStat
from rapidfuzz.distance import Levenshtein

import inkwell
from services import local

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


def test_a_picture_is_painted_with_live_progress(client: inkwell.Client) -> None:
    events = list(client.paint_stream("grinning face", seed=7, steps=6, previews=True))
    steps = [event.step for event in events if isinstance(event, inkwell.Progress)]
    previews = [event for event in events if isinstance(event, inkwell.Preview)]
    assert steps == list(range(1, 7))
    assert len(previews) == 6
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


def inkwell_processes() -> set[int]:
    return {p.pid for p in psutil.process_iter(["cmdline"]) if "services." in " ".join(p.info["cmdline"] or [])}


def test_the_demo_ends_well_and_leaves_nothing_running() -> None:
    before = inkwell_processes()
    demo = subprocess.run([sys.executable, "-m", "services.local", "demo"], capture_output=True, text=True, check=False)
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert (local.DEMO_OUTPUT / "grinning-face.png").exists()
    assert "build/demo/grinning-face.png" in demo.stdout
    assert inkwell_processes() <= before
