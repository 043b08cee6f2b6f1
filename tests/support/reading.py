"""Running the OCR engine in-process and asking the transformers library for the same."""

import random
from dataclasses import dataclass, field

import msgspec
import torch
from transformers import VisionEncoderDecoderModel

from services.kit.engine_api import Accepted, Cancelled, Described, Failed, Finished, Raw, Update
from services.ocr.domain import Decoding, EarlyStopping, Line, Partial, ReadJob, Recognition
from services.ocr.engine.embedding import Embedder
from services.ocr.engine.lane import Lane
from services.ocr.engine.loading import Desk
from services.ocr.engine.main import OcrEngine
from services.ocr.engine.pages import Pages
from services.ocr.engine.shelf import Shelf
from services.ocr.engine.sources import Source
from services.ocr.settings import Settings
from services.runtimes.hardware import detect

GREEDY = Decoding(beam_width=1, hypothesis_count=1, length_penalty=1.0, max_new_token_count=20)


def beams(
    width: int,
    *,
    count: int | None = None,
    penalty: float = 1.0,
    length: int = 20,
    ngram: int = 0,
    stopping: EarlyStopping = "heuristic",
) -> Decoding:
    return Decoding(width, count or width, penalty, length, ngram, stopping)


# What the library calls the ways of early stopping.
STOPPING: dict[EarlyStopping, bool | str] = {"first": True, "heuristic": False, "never": "never"}


def scribble(seed: int) -> Line:
    """A line of coarse noise; its size depends on the seed too."""
    source = random.Random(seed)
    width, height = source.randrange(30, 200), source.randrange(10, 60)
    columns = [[source.randrange(256) for _ in range(width // 6 + 1)] for _ in range(height // 6 + 1)]
    pixels = bytes(columns[y // 6][x // 6] for y in range(height) for x in range(width) for _ in range(3))
    return Line(width, height, pixels)


def lane_in(engine: OcrEngine, model: str = "tiny") -> Lane:
    """The lane of a loaded model."""
    return engine.shelf.desks[model].lane


def engine_of(lane: Lane, model: str = "tiny") -> OcrEngine:
    """An engine that reads with this lane alone."""
    shelf = Shelf(Settings(models={model: "nowhere"}), detect(), 0)
    shelf.desks[model] = Desk(lane, Embedder(lane.model, batch_size=8, step_s=10.0), Source("float32"))
    return OcrEngine(shelf, Pages(None))


@dataclass
class Read:
    """What the engine said about one job."""

    accepted: bool = False
    partials: list[Partial] = field(default_factory=list)
    recognition: Recognition | None = None
    failed: Failed | None = None
    cancelled: bool = False

    @property
    def ids(self) -> list[list[int]]:
        """Token ids of every hypothesis."""
        assert self.recognition is not None
        return [[token.id for token in hypothesis.tokens] for hypothesis in self.recognition.hypotheses]

    @property
    def text(self) -> str:
        assert self.recognition is not None
        return self.recognition.hypotheses[0].text


class Reader:
    """Submits jobs and collects what comes of them."""

    def __init__(self, engine: OcrEngine, model: str = "tiny") -> None:
        self.engine = engine
        self.model = model
        self.reads: dict[str, Read] = {}

    def submit(self, job: str, line: Line, decoding: Decoding, *, partials: bool = False) -> Read:
        self.reads[job] = Read()
        self.engine.submit(job, Raw(msgspec.msgpack.encode(ReadJob(self.model, line, decoding, partials))))
        return self.reads[job]

    def step(self) -> None:
        for event in self.engine.step():
            if isinstance(event, Described):
                continue
            read = self.reads[event.job]
            assert read.recognition is None
            match event:
                case Accepted():
                    assert not read.accepted
                    read.accepted = True
                case Update(payload=payload):
                    assert read.accepted
                    read.partials.append(msgspec.msgpack.decode(payload, type=Partial))
                case Finished(payload=payload):
                    read.recognition = msgspec.msgpack.decode(payload, type=Recognition)
                case Failed():
                    read.failed = event
                case Cancelled():
                    read.cancelled = True

    def finish(self) -> None:
        while self.engine.busy:
            self.step()


def generate(
    model: VisionEncoderDecoderModel, pixel_values: torch.Tensor, decoding: Decoding, **options: object
) -> list[tuple[list[list[int]], list[float]]]:
    """What transformers' own `generate` reads: for each image the ids of every hypothesis, and the beams' scores."""
    if decoding.beam_width > 1:
        options["early_stopping"] = STOPPING[decoding.early_stopping]
    with torch.inference_mode():
        output = model.generate(
            pixel_values,
            num_beams=decoding.beam_width,
            num_return_sequences=decoding.hypothesis_count,
            max_new_tokens=decoding.max_new_token_count,
            length_penalty=decoding.length_penalty,
            no_repeat_ngram_size=decoding.no_repeat_ngram_size,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            **options,
        )
    eos = model.generation_config.eos_token_id
    sequences = output.sequences[:, 1:].tolist()  # without the start token
    # Shorter sequences of a batch are filled up behind their end token.
    cut = [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in sequences]
    count = decoding.hypothesis_count
    scores = output.sequences_scores.tolist() if decoding.beam_width > 1 else [0.0] * len(cut)
    return [(cut[i : i + count], scores[i : i + count]) for i in range(0, len(cut), count)]
