"""What a TrOCR-style model reads, whatever runs its graphs; and how the readings of two compare."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rapidfuzz.distance import Levenshtein
from transformers import AutoImageProcessor, AutoTokenizer

from services.compiler.export.exported import Exported
from services.compiler.quality import lines as line_files
from services.compiler.quality.lines import Line
from services.runtimes import trocr_graphs as names
from services.runtimes.artifacts.manifest import BuiltOn, Graph, Manifest, Requires
from services.runtimes.graph_trocr import GraphTrocr
from services.runtimes.sessions.interface import Session
from services.runtimes.trocr_rows import Networks, Rows

# The issue's own number; fewer when they would take longer than the time below.
LINE_COUNT = 500
LINES_LEAST = 32
SECONDS_MOST = 150.0
# Images that are read at a time.
BATCH = 8
_SAMPLES = "samples"


class Reader:
    """A checkpoint's preprocessing, greedy decoding and tokenizer, around any sessions of its graphs."""

    def __init__(self, exported: Exported, checkpoint: Path) -> None:
        """checkpoint: the folder that the graphs were exported from."""
        details = exported.details
        self._processor: Any = AutoImageProcessor.from_pretrained(checkpoint, backend="pil", trust_remote_code=False)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
        self._mode = "L" if details["channels"] == 1 else "RGB"
        generation = _generation(checkpoint)
        self._start = int(generation["decoder_start_token_id"])
        ends = generation["eos_token_id"]
        self._ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        wanted = generation.get("max_new_tokens") or generation.get("max_length") or details["position_limit"]
        self._length = min(int(wanted), int(details["position_limit"]) - 1)
        self._manifest = _manifest(exported)
        most = [
            axis.high for graph in exported.graphs for axis in graph.axes if axis.name in (names.IMAGES, names.ROWS)
        ]
        self._batch = min(BATCH, *most)

    def networks(self, sessions: Mapping[str, Session]) -> GraphTrocr:
        """The model that these sessions of its graphs are."""
        return GraphTrocr(sessions[names.ENCODER], sessions[names.DECODER], self._manifest)

    def read(self, networks: Networks, lines: Sequence[Line]) -> list[str]:
        """The text of every line, greedily decoded, without the options that a service adds."""
        texts: list[str] = []
        with torch.inference_mode():
            for start in range(0, len(lines), self._batch):
                texts += self._read_batch(networks, lines[start : start + self._batch])
        return texts

    def _read_batch(self, networks: Networks, lines: Sequence[Line]) -> list[str]:
        pixels = self._processor([line.image.convert(self._mode) for line in lines], return_tensors="pt")
        rows = Rows(networks)
        rows.join(networks.encode(pixels["pixel_values"].float()))
        read: list[list[int]] = [[] for _ in lines]
        open_lines = list(range(len(lines)))  # the line of each row
        tokens = [self._start] * len(lines)
        for _ in range(self._length):
            tokens = rows.step(tokens).argmax(-1).tolist()
            for line, token in zip(open_lines, tokens, strict=True):
                read[line].append(token)
            going = [row for row, token in enumerate(tokens) if token not in self._ends]
            if not going:
                break
            if len(going) < len(tokens):
                # One row an image, so that a row's number is its image's.
                placed = rows.rearrange([(row, [row]) for row in going])
                seats = {own[0]: row for row, (_, own) in zip(going, placed, strict=True)}
                open_lines = [open_lines[seats[seat]] for seat in range(len(seats))]
                tokens = [tokens[seats[seat]] for seat in range(len(seats))]
        return [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in read]


def lines_for(folder: str, checkpoint: Path) -> tuple[list[Line], list[Line]]:
    """Lines to calibrate on, and others to measure on, at most LINE_COUNT.

    folder: labelled lines of the caller's, every fourth of which is calibrated on; "" for the samples beside the
    checkpoint and rendered ones. Raises LinesError.
    """
    if folder:
        own = line_files.labelled(Path(folder))
        if len(own) < 2:
            raise line_files.LinesError(f"{folder}: it has one line; calibrating and measuring take two at least")
        calibrating = own[::4]
        measured = [line for number, line in enumerate(own) if number % 4]
        return line_files.evenly(calibrating, 64), line_files.evenly(measured, LINE_COUNT)
    samples = checkpoint / _SAMPLES
    own = line_files.labelled(samples) if (samples / line_files.LABELS).is_file() else []
    return line_files.rendered(48, seed=1), [*own, *line_files.rendered(LINE_COUNT - len(own))]


def as_many_as_time_allows(reader: Reader, networks: Networks, lines: Sequence[Line]) -> tuple[list[Line], list[str]]:
    """The lines that the networks read within SECONDS_MOST, LINES_LEAST at least, and their texts."""
    texts: list[str] = []
    began = time.perf_counter()
    while len(texts) < len(lines):
        texts += reader.read(networks, lines[len(texts) : len(texts) + LINES_LEAST])
        if time.perf_counter() - began > SECONDS_MOST:
            break
    return list(lines[: len(texts)]), texts


def character_error_rate(texts: Sequence[str], lines: Sequence[Line]) -> float:
    """Edits over the characters of what the lines say, summed over all lines."""
    edits = sum(Levenshtein.distance(text, line.text) for text, line in zip(texts, lines, strict=True))
    return edits / sum(len(line.text) for line in lines)


def _generation(checkpoint: Path) -> dict[str, Any]:
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    decoder = config.get("decoder", {})
    found = {
        key: config.get(key, decoder.get(key))
        for key in ("decoder_start_token_id", "eos_token_id", "max_length", "max_new_tokens")
    }
    own = checkpoint / "generation_config.json"
    if own.is_file():
        said = json.loads(own.read_text("utf-8"))
        found |= {key: said[key] for key in found if said.get(key) is not None}
    if found["decoder_start_token_id"] is None:
        found["decoder_start_token_id"] = config.get("bos_token_id", decoder.get("bos_token_id", 0))
    return found


def _manifest(exported: Exported) -> Manifest:
    """What GraphTrocr wants to know of an artifact, of which there is none yet."""
    return Manifest(
        format=0,
        kind=exported.kind,
        model="",
        source="",
        source_digest="",
        recipe="",
        target="onnx",
        precision="float32",
        graphs=tuple(
            Graph(graph.component, graph.file.name, graph.inputs, graph.outputs, graph.axes, 0)
            for graph in exported.graphs
        ),
        model_folder="",
        files=(),
        built_on=BuiltOn("cpu", "", (), {}),
        requires=Requires(),
        checks=(),
        measured=(),
        created_at="",
        details=exported.details,
    )
