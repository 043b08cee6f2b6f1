"""Character error rate of an exported folder (or a model in training) on folders of ``labels.tsv`` + images."""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoTokenizer, VisionEncoderDecoderModel, ViTImageProcessorPil

from .vocabulary import normalise


def edit_distance(one: str, two: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(two) + 1))
    for index, left in enumerate(one, 1):
        before, row[0] = row[0], index
        for place, right in enumerate(two, 1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (left != right))
    return row[-1]


def error_rate(pairs: list[tuple[str, str]]) -> float:
    """Edits over characters of the truth, over all (truth, guess) pairs."""
    return sum(edit_distance(truth, guess) for truth, guess in pairs) / max(1, sum(len(truth) for truth, _ in pairs))


def read_folder(folder: Path) -> list[tuple[Path, str]]:
    """Image paths and texts of a ``labels.tsv`` folder."""
    rows = (folder / "labels.tsv").read_text(encoding="utf-8").splitlines()[1:]
    return [(folder / row.split("\t")[0], normalise(row.split("\t")[1])) for row in rows]


@torch.inference_mode()
def read_lines(model: VisionEncoderDecoderModel, pixels: torch.Tensor, decode, beams: int = 1) -> list[str]:  # noqa: ANN001
    """Texts of a tensor of images by the decoder's own ``generate``."""
    texts: list[str] = []
    for start in range(0, len(pixels), 50):
        out = model.generate(pixel_values=pixels[start : start + 50], num_beams=beams, do_sample=False)
        texts += [decode(row) for row in out.tolist()]
    return texts


def main() -> None:
    """Print the error rate of an exported folder on each data folder, with some lines to look at."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--limit", type=int, default=0, help="a random sample of this many lines (0: all)")
    parser.add_argument("--show", type=int, default=8)
    parser.add_argument("folders", type=Path, nargs="+")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = VisionEncoderDecoderModel.from_pretrained(arguments.model, dtype=torch.float32).eval()
    processor = ViTImageProcessorPil.from_pretrained(arguments.model)
    tokens = AutoTokenizer.from_pretrained(arguments.model)
    for folder in arguments.folders:
        rows = read_folder(folder)
        if arguments.limit:
            rows = random.Random(0).sample(rows, min(arguments.limit, len(rows)))
        images = [Image.open(path).convert("RGB") for path, _ in rows]
        pixels = torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in images])
        began = time.monotonic()
        guesses = read_lines(model, pixels, lambda ids: tokens.decode(ids, skip_special_tokens=True), arguments.beams)
        took = time.monotonic() - began
        pairs = [(text, guess) for (_, text), guess in zip(rows, guesses, strict=True)]
        exact = sum(truth == guess for truth, guess in pairs) / len(pairs)
        print(
            f"{folder.name}: CER {error_rate(pairs):.4f}, exact lines {exact:.3f}, {len(pairs)} lines, "
            f"beams {arguments.beams}, {len(pairs) / took:.1f} lines/s"
        )
        for truth, guess in pairs[: arguments.show]:
            print(f"    {truth!r} read as {guess!r}")


if __name__ == "__main__":
    main()
