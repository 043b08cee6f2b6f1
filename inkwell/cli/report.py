"""What the command says: results on stdout, errors on stderr, and the exit code."""

import dataclasses
import enum
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from inkwell import errors


class Exit(enum.IntEnum):
    """Exit codes, for scripts."""

    OK = 0
    FAILED = 1  # some of several images failed, or a defect of the server
    INVALID = 2  # wrong usage or a request that can never work
    NOT_FOUND = 3
    UNAVAILABLE = 4
    OVERLOADED = 5
    DEADLINE = 6
    PRECONDITION = 7  # the server cannot or will not do it: hardware, missing call, access
    INTERRUPTED = 130
    PIPE_CLOSED = 141  # the reader of stdout went away


_EXITS: dict[type[errors.InkwellError], Exit] = {
    errors.InvalidRequest: Exit.INVALID,
    errors.TooLarge: Exit.INVALID,
    errors.NotFound: Exit.NOT_FOUND,
    errors.Unavailable: Exit.UNAVAILABLE,
    errors.Overloaded: Exit.OVERLOADED,
    errors.DeadlineExceeded: Exit.DEADLINE,
    errors.FailedPrecondition: Exit.PRECONDITION,
    errors.Unimplemented: Exit.PRECONDITION,
    errors.Unauthenticated: Exit.PRECONDITION,
    errors.PermissionDenied: Exit.PRECONDITION,
}

# Where the library's hint speaks of functions, the command speaks of commands and options.
_HINTS: dict[type[errors.InkwellError], str] = {
    errors.NotFound: "`inkwell models`, `schedulers`, `adapters` and `controls` list what there is.",
    errors.FailedPrecondition: "Ask for other --hardware or another --model; `inkwell fleet` lists what there is.",
    errors.DeadlineExceeded: "Allow more --timeout, or ask for less: fewer steps or pictures, a narrower beam.",
}

_OPTIONS = {
    "image.content": "IMAGE",
    "images.content": "IMAGE",
    "content": "FILE",
    "beam_width": "--beam-width",
    "hypothesis_count": "--alternatives",
    "length_penalty": "--length-penalty",
    "max_new_token_count": "--max-tokens",
    "no_repeat_ngram_size": "--no-repeat",
    "early_stopping": "--early-stopping",
    "languages": "--language",
    "language_hints": "--language",
    "pages": "--pages",
    "page_ranges": "--pages",
    "first_page": "--pages",
    "last_page": "--pages",
    "dpi": "--dpi",
    "min_confidence": "--min-confidence",
    "orientation": "--orientation",
    "export": "--format",
    "export_formats": "--format",
    "pooling": "--pooling",
    "dtype": "--dtype",
    "precision": "--precision",
    "artifact": "--artifact",
    "runtime": "--runtime",
    "name": "NAME",
    "model": "--model",
    "prompt": "PROMPT",
    "negative_prompt": "--negative",
    "width": "--size",
    "height": "--size",
    "step_count": "--steps",
    "guidance_scale": "--guidance",
    "scheduler": "--scheduler",
    "seed": "--seed",
    "image_count": "--count",
    "media_type": "--output",
    "quality": "--quality",
    "batch_count": "--batches",
    "prompt_syntax": "--plain-prompt",
    "styles": "--style",
    "wildcard_seed": "--wildcard-seed",
    "image": "--image",
    "strength": "--strength",
    "inpaint.mask": "--mask",
    "inpaint.blur_px": "--mask-blur",
    "inpaint.inverted": "--invert-mask",
    "inpaint.crop_padding_px": "--inpaint-padding",
    "inpaint.fill": "--fill",
    "inpaint": "--mask",
    "outpaint.blur_px": "--mask-blur",
    "outpaint.fill": "--fill",
    "outpaint": "--outpaint",
    "controls": "--control",
    "image_prompts": "--image-prompt",
    "loras": "--lora",
    "hires.upscaler": "--hires-upscaler",
    "hires.step_count": "--hires-steps",
    "hires.strength": "--hires-strength",
    "hires": "--hires",
    "refiner.switch_at": "--switch-at",
    "refiner": "--refiner",
    "sampling.sigma_schedule": "--sigmas",
    "sampling.sigmas": "--sigmas",
    "sampling.timestep_spacing": "--spacing",
    "sampling.prediction_type": "--prediction-type",
    "sampling.eta": "--eta",
    "sampling.timesteps": "--timesteps",
    "guidance_rescale": "--guidance-rescale",
    "perturbed_attention.adaptive_scale": "--pag-adaptive",
    "perturbed_attention": "--pag",
    "freeu": "--freeu",
    "clip_skip": "--clip-skip",
    "variation.seed": "--variation-seed",
    "variation.strength": "--variation-strength",
    "variation": "--variation-seed",
    "vae.tiled": "--vae-tiled",
    "vae.upcast": "--vae-upcast",
    "vae": "--vae",
    "preview.step_interval": "--preview-interval",
    "preview.method": "--preview-method",
    "inkwell-hardware": "--hardware",
}

_LAST_COLUMN_LEAST = 6
"""Characters that a table keeps for its last column, if it can."""


class PipeClosed(Exception):
    """Whoever read stdout has stopped, as `head` does."""


def prepare_streams() -> None:
    """Never fail on a character that the terminal cannot show."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def line(content: str) -> None:
    """One line of result, at once. Raises PipeClosed."""
    text(content + "\n")


def text(content: str) -> None:
    """Text of result with its own line ends, at once. Raises PipeClosed."""
    try:
        sys.stdout.write(content)
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_stdout()
        raise PipeClosed from None


def raw(content: bytes) -> None:
    """Bytes of result. Raises PipeClosed."""
    try:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        _discard_stdout()
        raise PipeClosed from None


def json_line(value: dict[str, Any]) -> None:
    """One JSON object on one line; floats with seven digits, null for those that JSON does not have."""
    line(json.dumps(_plain(value), ensure_ascii=False))


def note(text: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"inkwell: {text}\n")
    sys.stderr.flush()


def explain(error: errors.InkwellError, *, subject: str = "") -> None:
    """Say on stderr what happened, to which field, and what to do."""
    note(f"{subject}: {error.message}" if subject else error.message)
    for violation in error.fields:
        if violation.description not in error.message:
            sys.stderr.write(f"  {option(violation.field)}: {violation.description}\n")
    sys.stderr.write(f"  {hint(error)}\n")
    sys.stderr.flush()


def hint(error: errors.InkwellError) -> str:
    """What to do, in terms of this command."""
    if isinstance(error, errors.InvalidRequest) and error.fields:
        return f"Correct {', '.join(dict.fromkeys(option(each.field) for each in error.fields))}."
    return _HINTS.get(type(error), error.hint)


def error_as_json(error: errors.InkwellError) -> dict[str, Any]:
    """The error as the value of "error" in a line of `--json`."""
    return {
        "code": error.code,
        "reason": error.reason,
        "message": error.message,
        "fields": [dataclasses.asdict(each) for each in error.fields],
        "retry_after_s": error.retry_after_s,
        "hint": hint(error),
    }


def exit_code(error: errors.InkwellError) -> Exit:
    """The exit code of a command that this error ended."""
    return _EXITS.get(type(error), Exit.FAILED)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on a terminal; in a pipe a line of tab-separated values a row, below a line of names."""
    if not sys.stdout.isatty():
        for row in (columns, *rows):
            line("\t".join(cell.replace("\t", " ").replace("\n", " ") for cell in row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    shown = Table(box=None, pad_edge=False, header_style="bold")
    # The last column, the longest, gives way on a narrow terminal; all do where that is not enough.
    widths = [max(map(len, column)) + 2 for column in zip(columns[:-1], *(row[:-1] for row in rows), strict=True)]
    fits = sum(widths) + _LAST_COLUMN_LEAST <= console.width
    for name in columns:
        shown.add_column(name, overflow="fold", no_wrap=fits and name != columns[-1])
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))
    console.print(shown)


def option(field: str) -> str:
    """The option or argument that a request field, by its path in the proto, is given with."""
    path = re.sub(r"\[\d+\]", "", field)  # an element of a list is its option's matter
    first, _, last = path.partition(".")
    return _OPTIONS.get(path) or _OPTIONS.get(first) or _OPTIONS.get(last.rsplit(".", 1)[-1], field)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


def _discard_stdout() -> None:
    # The interpreter flushes stdout once more as it ends; that must not fail, too.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
