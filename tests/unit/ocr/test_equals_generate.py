"""Hundreds of lines of many lengths, read one beside the other, come out token for token as `generate` reads them."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import VisionEncoderDecoderModel

from services.ocr.domain import Decoding, Line
from services.ocr.engine.main import OcrEngine, create_engine
from services.ocr.settings import Settings
from tests.support.reading import GREEDY, Reader, beams, generate, lane_in, scribble

EMBEDDED = Path(__file__).resolve().parents[3] / "models" / "handwriting-tiny"
# Texts whose scores differ by less are equally good: floating point decides between them.
TIE = 1e-4
# Of all hypotheses compared with one model and one way of decoding.
TIES_MOST = 0.01
TOGETHER = 50  # images that `generate` is given at a time


@dataclass
class Trial:
    """A model in the engine and in the library, and lines for both."""

    engine: OcrEngine
    model: VisionEncoderDecoderModel
    lines: list[Line]

    def compare(self, decoding: Decoding) -> None:
        reader = Reader(self.engine)
        for number, line in enumerate(self.lines):
            reader.submit(str(number), line, decoding)
            reader.step()  # so that lines join at all steps of others
        reader.finish()
        ties, texts = 0, set()
        for number, (wanted, scores, pixels) in enumerate(self._expected(decoding)):
            read = reader.reads[str(number)]
            assert read.recognition is not None
            assert not read.recognition.blank
            assert len(read.ids) == len(wanted)
            texts.add(tuple(read.ids[0]))
            for place, (own, other) in enumerate(zip(read.ids, wanted, strict=True)):
                if decoding.beam_width == 1:
                    gap = 0.0 if own == other else self._greedy_gap(pixels, own, other)
                else:
                    gap = abs(read.recognition.hypotheses[place].score - scores[place])
                assert gap < TIE, f"line {number}, hypothesis {place}: {own} instead of {other}"
                ties += own != other
        count = len(self.lines) * decoding.hypothesis_count
        assert ties <= TIES_MOST * count, f"{ties} of {count} hypotheses are ties that fell the other way"
        assert len({len(ids) for ids in texts}) > 5, "texts of so few lengths show nothing"

    def _expected(self, decoding: Decoding) -> Iterator[tuple[list[list[int]], list[float], torch.Tensor]]:
        for begin in range(0, len(self.lines), TOGETHER):
            pixels = lane_in(self.engine).model.prepare(self.lines[begin : begin + TOGETHER])
            for offset, (ids, scores) in enumerate(generate(self.model, pixels, decoding)):
                yield ids, scores, pixels[offset : offset + 1]

    def _greedy_gap(self, pixels: torch.Tensor, own: Sequence[int], other: Sequence[int]) -> float:
        """How much likelier one text's token is than the other's where they part."""
        same = next(n for n, pair in enumerate(zip(own, other, strict=False)) if pair[0] != pair[1])
        start = self.model.generation_config.decoder_start_token_id
        with torch.inference_mode():
            logits = self.model(pixel_values=pixels, decoder_input_ids=torch.tensor([[start, *own[:same]]])).logits[
                0, -1
            ]
        scores = logits.log_softmax(-1)
        return abs(float(scores[own[same]] - scores[other[same]]))


@pytest.fixture(scope="module")
def random_weights(shared_engine: OcrEngine, tiny_model: VisionEncoderDecoderModel) -> Trial:
    return Trial(shared_engine, tiny_model, [scribble(seed) for seed in range(250)])


@pytest.fixture(scope="module")
def embedded() -> Trial:
    """Real readings: pieces of the samples, from a word to a whole line, a little turned and stretched."""
    engine = create_engine(Settings(models={"tiny": str(EMBEDDED)}, threads=1, max_rows=32).model_dump_json())
    model = VisionEncoderDecoderModel.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    source = random.Random(7)
    lines = []
    for path in sorted((EMBEDDED / "samples").glob("*.png")) * 6:
        whole = Image.open(path).convert("RGB")
        part = int(whole.width * source.uniform(0.2, 1.0))
        left = source.randint(0, whole.width - part)
        piece = whole.crop((left, 0, left + part, whole.height))
        piece = piece.rotate(source.uniform(-2, 2), Image.Resampling.BICUBIC, fillcolor="white")
        piece = piece.resize((int(part * source.uniform(0.8, 1.3)), whole.height))
        lines.append(Line(piece.width, piece.height, piece.tobytes()))
    return Trial(engine, model, lines)


@pytest.mark.parametrize(
    "decoding",
    [
        GREEDY,
        beams(1, ngram=2),
        beams(4),
        beams(5, count=2, penalty=0.3, ngram=3, stopping="first"),
        beams(3, penalty=2.0, stopping="never"),
    ],
    ids=str,
)
def test_random_weights_on_two_hundred_and_fifty_lines(random_weights: Trial, decoding: Decoding) -> None:
    random_weights.compare(decoding)


@pytest.mark.parametrize(
    "decoding",
    [beams(1, length=95), beams(4, count=2, length=95), beams(3, penalty=2.0, ngram=3, stopping="first", length=95)],
    ids=str,
)
def test_the_embedded_model_on_pieces_of_its_samples(embedded: Trial, decoding: Decoding) -> None:
    embedded.compare(decoding)
