"""`python -m services.ocr.quantize MODEL --precision int8_static --data DIR --output DIR`: a folder of 8-bit weights.

The folder is served as any other. DIR holds lines to read, with labels.tsv as for `evaluate`; the range of what goes
into each layer is found on them (int8_static only). Do not measure the model on these lines afterwards.
"""

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from services.kit.images import Limits
from services.ocr import images
from services.ocr.evaluate import LABELS, BadFolder, Label, evenly, read_labels
from services.ocr.settings import Settings

if TYPE_CHECKING:
    from transformers import VisionEncoderDecoderModel

    from services.runtimes.int8 import InputRange
    from services.runtimes.precision import Precision

# Their inputs settle within a hundred lines or so; more cost time and change little.
DEFAULT_LINE_COUNT = 256


class Int8(StrEnum):
    """The precisions that a folder of 8-bit weights can be made for."""

    int8_static = "int8_static"
    int8_dynamic = "int8_dynamic"
    int8_weight_only = "int8_weight_only"


@dataclass(frozen=True)
class Quantized:
    """A folder that was written."""

    folder: Path
    precision: str
    line_count: int  # lines that the ranges were found on
    file_bytes: int  # of the weights on disk
    memory_bytes: int  # of the weights when loaded
    float32_bytes: int  # of the same weights in float32


def quantize(
    source: Path, output: Path, precision: "Precision", labels: Sequence[Label], settings: Settings
) -> Quantized:
    """Round the weights of the model folder `source` into the new folder `output`.

    labels: lines to find input ranges on, for "int8_static". Raises CheckpointError for a folder that cannot be used.
    """
    from services.runtimes import int8, int8_folder, torch_trocr
    from services.runtimes.hardware import detect
    from services.runtimes.precision import parameter_count, refusal, weight_bytes

    hardware = detect()
    model = torch_trocr.load(source, device=hardware.device, precision="float32", hardware=hardware)
    ranges = _input_ranges(model, source, labels, settings) if precision == "int8_static" else {}
    model = model.cpu()
    int8_folder.write(output, source, model, int8.round_weights(model), ranges, precision)
    (output / "README.md").write_text(_card(source, precision, len(labels)), "utf-8")
    float32_bytes = 4 * parameter_count(model)
    del model
    # Read back as the service will; where this machine cannot compute so, as float32.
    computed = "float32" if refusal(precision, hardware) else precision
    loaded = torch_trocr.load(output, device=hardware.device, precision=computed, hardware=hardware)
    return Quantized(
        folder=output,
        precision=precision,
        line_count=len(labels) if ranges else 0,
        file_bytes=(output / int8_folder.WEIGHTS).stat().st_size,
        memory_bytes=weight_bytes(loaded),
        float32_bytes=float32_bytes,
    )


def _input_ranges(
    model: "VisionEncoderDecoderModel", source: Path, labels: Sequence[Label], settings: Settings
) -> "dict[str, InputRange]":
    """Read the lines greedily, one at a time (no padding then), and see what goes into each layer."""
    import torch

    from services.ocr.engine.model import load_helpers, preprocess
    from services.runtimes import input_ranges

    processor, _ = load_helpers(source)
    channels = int(getattr(model.config.encoder, "num_channels", 3))
    own = model.generation_config
    length = own.max_new_tokens or (own.max_length - 1 if own.max_length else settings.default_max_new_token_count)
    length = min(length, model.config.decoder.max_position_embeddings - 1)
    limits = Limits(settings.max_image_bytes, settings.max_image_pixels, settings.min_image_side)
    with input_ranges.watch(model) as histograms, torch.inference_mode():
        for label in labels:
            pixels = preprocess(processor, channels, [images.decode(label.path.read_bytes(), limits)])
            model.generate(pixels.to(model.device), num_beams=1, do_sample=False, max_new_tokens=length)
    return {name: histogram.input_range() for name, histogram in histograms.items()}


def _card(source: Path, precision: str, line_count: int) -> str:
    """A model card: the front matter and text of the source's own, under what was done to it."""
    card = source / "README.md"
    original = card.read_text("utf-8") if card.is_file() else ""
    matter = re.match(r"---\n.*?\n---\n", original, flags=re.DOTALL)
    front, body = (matter.group(), original[matter.end() :]) if matter else ("", original)
    found = f"\nThe ranges of the layers' inputs were found on {line_count} lines." if line_count else ""
    below = f"\nIts own card follows. What it says of files, size and quality is about the original.\n\n{body.lstrip()}"
    return f"""{front}# {source.resolve().name} with 8-bit weights ({precision})

Made by `python -m services.ocr.quantize`. Linear, convolution and embedding weights are int8 with one scale a channel
(symmetric, -127 to 127); biases, norms and positions are as they were.{found}

The OCR service of Inkwell serves this folder as any other. **Plain transformers does not load it**: the weights are in
`model.int8.safetensors`, described by `inkwell_int8` in `config.json`, and it will say that it finds none.
{below if body.strip() else ""}"""


def command(
    model: Annotated[str, typer.Argument(help="name of a configured model, a folder, or owner/name@revision")],
    output: Annotated[Path, typer.Option(help="folder to write; must not exist")],
    precision: Annotated[Int8, typer.Option(help="what the folder is made for")] = Int8.int8_static,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help=f"folder with {LABELS} (columns file, text); for int8_static")
    ] = None,
    limit: Annotated[
        int, typer.Option(min=1, help="lines to find ranges on at most, evenly taken from all")
    ] = DEFAULT_LINE_COUNT,
) -> None:
    """Write a model folder with 8-bit weights."""
    labels: list[Label] = []
    try:
        if output.exists():
            raise BadFolder([f"{output}: it exists already"])
        settings = Settings()
        limits = Limits(settings.max_image_bytes, settings.max_image_pixels, settings.min_image_side)
        if precision is Int8.int8_static:
            if data is None:
                raise BadFolder(["int8_static needs --data DIR: lines to find the ranges of the layers' inputs on"])
            labels = evenly(read_labels(data, limits), limit)
    except BadFolder as bad:
        for problem in bad.problems:
            print(problem, file=sys.stderr)
        raise typer.Exit(2) from None
    except ValidationError as error:
        for detail in error.errors():
            print(f"{'.'.join(str(part) for part in detail['loc'])}: {detail['msg']}", file=sys.stderr)
        raise typer.Exit(2) from None

    # Late: the checks above answer at once, this takes seconds.
    from transformers.utils import logging as transformers_logging

    from services.runtimes import checkpoints
    from services.runtimes.checkpoints import CheckpointError

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    began = time.perf_counter()
    try:
        source = checkpoints.fetch(checkpoints.resolve(settings.models.get(model, model)))
        done = quantize(source, output, precision.value, labels, settings)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    share = 100 / done.float32_bytes
    print(f"folder\t{done.folder}")
    print(f"precision\t{done.precision}")
    print(f"lines for input ranges\t{done.line_count}")
    print(f"float32 weights\t{done.float32_bytes} bytes")
    print(f"weights on disk\t{done.file_bytes} bytes\t{done.file_bytes * share:.1f} %")
    print(f"weights in memory\t{done.memory_bytes} bytes\t{done.memory_bytes * share:.1f} %")
    print(f"seconds\t{time.perf_counter() - began:.1f}")


def main() -> None:
    """Entry point."""
    typer.run(command)


if __name__ == "__main__":
    main()
