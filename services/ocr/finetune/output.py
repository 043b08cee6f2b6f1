"""The folder that a run leaves: a model as the Hub lays it out, with a card, whole or not at all."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import yaml
from transformers import TrOCRProcessor

from services.ocr.finetune.base import Base
from services.ocr.finetune.options import Options

_LARGEST_HALF = 65504.0  # the largest number of float16


@dataclass(frozen=True)
class Measure:
    """Character error rates of one set of lines, before and after."""

    name: str
    lines: int
    before: float
    after: float


@dataclass(frozen=True)
class Facts:
    """What the card says of a run."""

    data: Sequence[tuple[str, int, int]]  # source, lines, writers
    held_out: str
    learned: str
    added: str
    dropped: str
    steps: int
    best_step: int
    minutes: float
    measures: Sequence[Measure]


def write(base: Base, options: Options, facts: Facts, longest: int) -> None:
    """Write the model beside its place, then move it there; a reader never sees half a folder.

    `longest` is the most tokens a training line has, end mark included: the model must be allowed to write as many.
    """
    # Names with a dot in front: whoever lists a folder of models skips them.
    fresh = options.output.with_name(f".{options.output.name}.fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    model = base.model.to("cpu").eval()
    generation = model.generation_config
    if generation.max_new_tokens is None:
        generation.max_length = min(base.position_limit, max(generation.max_length or 0, longest + 1))
    else:
        generation.max_new_tokens = min(base.position_limit - 1, max(generation.max_new_tokens, longest))
    half = options.weights == "float16" and all(p.abs().max() < _LARGEST_HALF for p in model.parameters() if p.numel())
    model.to(torch.float16 if half else torch.float32)
    for part in (model.config.encoder, model.config.decoder, getattr(model.config.encoder, "backbone_config", None)):
        if part is not None:
            part.dtype = None  # training's; the whole says what the file holds
    model.save_pretrained(fresh)
    for name in ("is_local", "local_files_only"):  # how the base's tokenizer was found here
        base.tokenizer.init_kwargs.pop(name, None)
    TrOCRProcessor(image_processor=base.processor, tokenizer=base.tokenizer).save_pretrained(fresh)
    (fresh / "README.md").write_text(card(options, facts), "utf-8")
    for path in fresh.iterdir():
        path.chmod(0o644)  # the weights' writer leaves them to their owner alone
    replace_folder(fresh, options.output)


def replace_folder(fresh: Path, folder: Path) -> None:
    """Put a folder in another's place."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def public_name(source: str) -> str:
    """A hub id as it is; of a place on this machine only its last part."""
    path = Path(source).expanduser()
    return path.name if path.exists() else source


def card(options: Options, facts: Facts) -> str:
    """The model card: front matter that the Hub and the service read, then what was done and measured."""
    head: dict[str, object] = {
        "base_model": public_name(options.base),
        "library_name": "transformers",
        "pipeline_tag": "image-to-text",
        "tags": ["trocr", "handwriting", "inkwell"],
        "metrics": ["cer"],
    }
    if options.languages:
        head = {"language": list(options.languages), **head}
    lines = ["---", yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(), "---", ""]
    lines += [f"# {options.output.name}", ""]
    start = "the same architecture with random weights" if options.scratch else f"`{public_name(options.base)}`"
    lines += [f"Reads one line of handwriting. Trained on {date.today().isoformat()} from {start}.", ""]
    if facts.measures:
        lines += ["## Measured quality", "", "Character error rate, greedy.", ""]
        lines += ["| lines | count | before | after |", "|---|---|---|---|"]
        lines += [f"| {m.name} | {m.lines} | {m.before:.4f} | {m.after:.4f} |" for m in facts.measures]
        if options.keep == "best" and any(m.name == "validation" for m in facts.measures):
            lines += ["", "The validation lines chose among the checkpoints, which flatters their figure a little."]
        lines += [""]
    lines += ["## Data", "", "| source | lines | writers |", "|---|---|---|"]
    lines += [f"| {public_name(name)} | {count} | {writers or 'unknown'} |" for name, count, writers in facts.data]
    lines += ["", f"Held out: {facts.held_out}.", ""]
    lines += ["## Training", "", f"- learned: {facts.learned}"]
    if facts.added:
        lines += [f"- characters added: `{facts.added}`"]
    if facts.dropped:
        lines += [f"- characters dropped: `{facts.dropped}`"]
    lines += [
        f"- {facts.steps} steps of {options.batch} lines in {facts.minutes:.1f} minutes; the weights are those of step"
        f" {facts.best_step}{', averaged' if options.average else ''}",
        f"- AdamW, peak rate {options.rate:g}, cosine, {options.warmup} steps of warm-up, {options.precision},"
        f" distortion {options.strength:g}, token noise {options.token_noise:g}, seed {options.seed}",
        "",
    ]
    return "\n".join(lines)
