"""Compiled models read what torch reads, under the same continuous batch, cancellation and embeddings."""

import subprocess
import sys
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

import msgspec
import pytest
import torch
from PIL import Image

from services.kit.engine_api import Finished, Raw
from services.ocr.domain import Decoding, Embedding, EmbedJob, Line
from services.ocr.engine.main import OcrEngine, create_engine
from services.ocr.settings import Settings
from tests.support.compiled_trocr import EMBEDDED, FAMILIES, TARGETS, Compiled, compiled, embedded, tied
from tests.support.reading import GREEDY, Read, Reader, beams, lane_in, scribble

LINES = [scribble(seed) for seed in range(9)]
LONG = msgspec.structs.replace(GREEDY, max_new_token_count=46)


@dataclass
class Trial:
    """A checkpoint, its artifacts, and torch to compare with."""

    compiled: Compiled
    torch: OcrEngine

    def engine(self, runtime: str) -> OcrEngine:
        return engine_for(self.compiled, runtime)


def engine_for(compiled: Compiled, runtime: str) -> OcrEngine:
    settings = Settings(
        models={"tiny": str(compiled.folder)},
        artifact_store=compiled.store.location,
        runtime=runtime,
        threads=1,
        read_documents=False,
        detect_blank=False,
    )
    return create_engine(settings.model_dump_json())


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.__name__)
def trial(request: pytest.FixtureRequest) -> Trial:
    made = compiled(request.param)
    return Trial(made, engine_for(made, "torch"))


@pytest.fixture(scope="module", params=TARGETS)
def engine(request: pytest.FixtureRequest, trial: Trial) -> OcrEngine:
    return trial.engine(request.param)


def read_all(engine: OcrEngine, decoding: Decoding, lines: list[Line] = LINES) -> list[Read]:
    """Half of the lines start together, the others join one by one while those are under way."""
    reader = Reader(engine)
    reads = []
    for number, line in enumerate(lines):
        if number >= len(lines) // 2:
            for _ in range(3):
                reader.step()
        reads.append(reader.submit(str(number), line, decoding))
    reader.finish()
    return reads


def test_greedy_reading_equals_torchs(engine: OcrEngine, trial: Trial) -> None:
    for decoding in (GREEDY, LONG):
        assert [read.ids for read in read_all(engine, decoding)] == [
            read.ids for read in read_all(trial.torch, decoding)
        ]


def test_beams_equal_torchs(engine: OcrEngine, trial: Trial) -> None:
    decoding = beams(4, ngram=2)
    for ours, theirs in zip(read_all(engine, decoding), read_all(trial.torch, decoding), strict=True):
        assert ours.recognition is not None
        assert theirs.recognition is not None
        wanted = [hypothesis.score for hypothesis in theirs.recognition.hypotheses]
        assert [hypothesis.score for hypothesis in ours.recognition.hypotheses] == pytest.approx(wanted, rel=1e-4)
        # Only those whose scores are equal to the last bits may stand in each other's place.
        assert sorted(ours.ids) == sorted(theirs.ids)
        moved = [place for place, ids in enumerate(ours.ids) if ids != theirs.ids[place]]
        assert all(abs(wanted[place] - wanted[theirs.ids.index(ours.ids[place])]) < 1e-4 for place in moved)


def test_the_model_says_what_it_runs_on(engine: OcrEngine, trial: Trial) -> None:
    (info,), (torch_info,) = engine.info().models, trial.torch.info().models
    assert info.runtime in TARGETS
    assert trial.compiled.store.get(info.artifact).manifest.runtime == info.runtime
    assert info.version != torch_info.version
    same = msgspec.structs.replace(
        info, runtime="torch", artifact="", version=torch_info.version, weight_bytes=torch_info.weight_bytes
    )
    # Default decoding, calibration, languages, embeddings: all as on torch.
    assert same == torch_info


def test_embeddings_equal_torchs(engine: OcrEngine, trial: Trial) -> None:
    job = Raw(msgspec.msgpack.encode(EmbedJob("tiny", tuple(LINES[:3]), "none", "float32", False)))
    vectors = []
    for each in (engine, trial.torch):
        each.submit("embed", job)
        events = []
        while each.busy:
            events += each.step()
        (finished,) = [event for event in events if isinstance(event, Finished)]
        embedding = msgspec.msgpack.decode(finished.payload, type=Embedding)
        vectors.append(torch.frombuffer(bytearray(embedding.content), dtype=torch.float32).view(embedding.shape))
    torch.testing.assert_close(vectors[0], vectors[1], atol=2e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def small() -> Trial:
    made = compiled(tied)
    return Trial(made, engine_for(made, "torch"))


@pytest.mark.parametrize("runtime", TARGETS)
def test_a_text_never_depends_on_its_neighbours(small: Trial, runtime: str) -> None:
    engine = small.engine(runtime)
    wide, narrow = beams(5, count=5), LONG
    alone = []
    for number, line in enumerate(LINES):
        reader = Reader(engine)
        read = reader.submit("only", line, wide if number % 3 == 0 else narrow)
        reader.finish()
        alone.append(read.ids)
    reader = Reader(engine)
    together = []
    for number, line in enumerate(LINES):
        together.append(reader.submit(str(number), line, wide if number % 3 == 0 else narrow))
        for _ in range(number % 4):
            reader.step()
    left = reader.submit("leaves", LINES[0], wide)
    for _ in range(4):
        reader.step()
    engine.cancel("leaves")
    reader.finish()
    assert left.cancelled
    assert [read.ids for read in together] == alone


@pytest.mark.parametrize("runtime", TARGETS)
def test_cancelling_takes_no_further_step(small: Trial, runtime: str) -> None:
    engine = small.engine(runtime)
    reader = Reader(engine)
    read = reader.submit("wide", LINES[1], beams(16))
    lane = lane_in(engine)
    while lane.rows_in_use < 16:
        reader.step()
    engine.cancel("wide")
    assert lane.rows_in_use == 0
    reader.step()
    assert read.cancelled
    assert not engine.busy


def test_long_rows_make_room_and_give_it_back(small: Trial) -> None:
    """Compiled graphs read all of the cache, so it is as short as its rows allow."""
    engine = small.engine("onnxruntime")
    rows = lane_in(engine)._rows
    reader = Reader(engine)
    long = reader.submit("long", LINES[2], Decoding(1, 1, 1.0, 70, no_repeat_ngram_size=6))
    longest = 0
    while engine.busy:
        reader.step()
        longest = max(longest, rows._past.shape[4])
    assert len(long.ids[0]) == 70
    assert longest == 96
    assert rows._past.shape[4] == 32


# What anyone can write who was given the files and trocr_graphs.py's contract: none of our code.
PLAIN = """
import sys
import numpy as np

runtime, encoder, decoder, pixels, layers, start, end, most = sys.argv[1:]
if runtime == "onnxruntime":
    import onnxruntime

    def opened(file):
        session = onnxruntime.InferenceSession(file)
        names = [output.name for output in session.get_outputs()]
        return lambda feeds: dict(zip(names, session.run(None, feeds)))
else:
    import openvino

    def opened(file):
        model = openvino.Core().compile_model(file, "CPU")
        return lambda feeds: {output.get_any_name(): value for output, value in model(feeds).items()}

seen = opened(encoder)({"pixel_values": np.load(pixels)})
step = opened(decoder)
heads, size = seen["cross_k_0"].shape[1::2]
feeds = {name: value for name, value in seen.items() if name.startswith("cross_")}
feeds |= {"cross_grid": np.zeros((1, 1), np.int64), "cross_places": np.zeros(1, np.int64)}
for layer in range(int(layers)):
    for part in "kv":
        # Whatever lies beyond a row's own position is of no effect.
        feeds[f"past_{part}_{layer}"] = np.full((1, heads, int(most), size), 7.5, np.float32)
token, ids = int(start), []
for position in range(int(most)):
    feeds |= {"tokens": np.array([token]), "positions": np.array([position])}
    answer = step(feeds)
    for layer in range(int(layers)):
        for part in "kv":
            feeds[f"past_{part}_{layer}"][:, :, position] = answer[f"new_{part}_{layer}"][:, :, 0]
    token = int(answer["logits"][0].argmax())
    ids.append(token)
    if token == int(end):
        break
assert not [name for name in sys.modules if name == "torch" or name.startswith(("services", "inkwell"))]
print(*ids)
"""


@pytest.mark.parametrize("runtime", TARGETS)
def test_the_graphs_run_in_the_plain_runtime_with_none_of_our_code(trial: Trial, runtime: str, tmp_path: Path) -> None:
    import numpy as np

    model = lane_in(trial.torch).model
    np.save(tmp_path / "pixels.npy", model.prepare(LINES[:1]).numpy())
    (stored,) = trial.compiled.store.find(target=TARGETS[runtime])
    folder = trial.compiled.store.local_folder(stored.id)
    files = [str(folder / graph.file) for graph in stored.manifest.graphs]
    numbers = (stored.manifest.details["layer_count"], model.start_id, min(model.eos_ids), 20)
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, runtime, *files, str(tmp_path / "pixels.npy"), *map(str, numbers)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (read,) = read_all(trial.torch, GREEDY, LINES[:1])
    assert [int(token) for token in done.stdout.split()] == read.ids[0]


@pytest.mark.parametrize("runtime", ["torch", *TARGETS])
def test_the_embedded_model_reads_its_samples(runtime: str) -> None:
    samples = EMBEDDED / "samples"
    lines = []
    with (samples / "labels.tsv").open(encoding="utf-8") as labels:
        rows = [row.rstrip("\n").split("\t") for row in labels][1:4]
    for file, _ in rows:
        image = Image.open(samples / file).convert("RGB")
        lines.append(Line(image.width, image.height, image.tobytes()))
    decoding = msgspec.structs.replace(beams(4), max_new_token_count=100)
    read = [each.text for each in read_all(engine_for(compiled(embedded), runtime), decoding, lines)]
    # A letter or two are wrong, by the model's own doing.
    assert all(
        SequenceMatcher(None, *pair).ratio() > 0.9 for pair in zip(read, [text for _, text in rows], strict=True)
    )
