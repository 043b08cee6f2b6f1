"""From the options to checked lines, a model with its vocabulary, and arrays to train on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.ocr.evaluate import BadFolder
from services.ocr.finetune import base as bases
from services.ocr.finetune import rows, vocabulary
from services.ocr.finetune.batches import Lines, weights
from services.ocr.finetune.lines import are_grey, resized
from services.ocr.finetune.options import Options, Refused
from services.ocr.finetune.trainer import ReadingSet

_WIDER = 4 / 3  # lines are stored that much wider than the model sees them, for distortions to work on

Say = Callable[..., None]


@dataclass
class Material:
    """Checked lines, ready for tokens."""

    split: rows.Split
    validation: list[rows.Row]
    tests: list[tuple[str, list[rows.Row]]]
    everything: list[rows.Row]  # what is trained on and what chooses


def gather(options: Options) -> Material:
    """Read and check all lines.

    Raises BadFolder with every bad row of every source, Refused for shares that do not add up.
    """
    problems: list[str] = []

    def found(place: str, share: float | None = None, *, dataset: bool = False) -> list[rows.Source]:
        try:
            if dataset:
                return [rows.read_dataset(place, options.columns, share)]
            return [rows.read_folder(Path(place), share)]
        except BadFolder as bad:
            problems.extend(bad.problems)
            return []

    def lines(place: str) -> list[rows.Row]:
        return [row for source in found(place) for row in source.rows]

    try:
        folders = [rows.parse_source(text) for text in options.data]
        datasets = [rows.parse_source(text) for text in options.dataset]
    except ValueError as error:
        raise Refused(str(error)) from None
    sources = [source for place, share in folders for source in found(place, share)]
    sources += [source for place, share in datasets for source in found(place, share, dataset=True)]
    validation = [row for place in options.validation for row in lines(place)]
    tests = [(Path(place).name, lines(place)) for place in options.test]
    if problems:
        raise BadFolder(problems)
    share = 0.0 if options.validation else options.validation_share
    parts = rows.split(sources, share=share, seed=options.seed, writers=options.validation_writers)
    validation = rows.sample(validation or parts.validation, options.validation_lines, options.seed)
    try:
        weights([len(source.rows) for source in parts.train], [source.share for source in parts.train])
    except ValueError as error:
        raise Refused(str(error)) from None
    everything = [row for source in parts.train for row in source.rows] + validation
    return Material(parts, validation, tests, everything)


class Prepared:
    """The base with its vocabulary and frozen parts, and all lines as arrays and tokens."""

    def __init__(self, options: Options, base: bases.Base, material: Material, say: Say) -> None:
        self.base = base
        self.held_out = _held_out(options, material)
        for source in material.split.train:
            writers = {row.writer for row in source.rows if row.writer}
            share = f", {source.share:.0%} of every batch" if source.share is not None else ""
            by = f" by {len(writers)} writers" if writers else ""
            say(f"Data        {source.name}: {len(source.rows)} lines{by} to train on{share}", soft_wrap=True)
        say(f"Held out    {self.held_out}", soft_wrap=True)
        alphabet = vocabulary.alphabet(row.text for row in material.everything)
        known = vocabulary.writable(base.tokenizer, alphabet)
        texts = [vocabulary.tidy(row.text, known) for row in material.everything]
        self.vocabulary = bases.with_vocabulary(base, texts, options.vocabulary, options.seed)
        if self.vocabulary.added:
            say(f"Characters  added: {' '.join(self.vocabulary.added)}", soft_wrap=True)
        if self.vocabulary.dropped:
            say(f"Characters  dropped: {' '.join(self.vocabulary.dropped)}", soft_wrap=True)
        if options.scratch:
            bases.forget(base, options.seed)
        try:
            bases.freeze(base.model, options.freeze, learn_tokens=self.vocabulary.changed)
        except ValueError as error:
            raise Refused(f"--freeze {error}") from None
        learning, self.total = bases.counts(base.model)
        self.learned = f"{learning / 1e6:.2f} of {self.total / 1e6:.2f} million parameters (freeze: {options.freeze})"
        say(f"Learns      {self.learned}")
        self.characters = vocabulary.writable(base.tokenizer, alphabet)
        self.left_out: dict[str, int] = {}
        cache = options.cache or options.training / "cache"
        wider = _WIDER if options.strength > 0 else 1.0
        self.sources: list[Lines] = []
        self.shares: list[float | None] = []
        for source in material.split.train:
            pairs = [(row, tokens) for row in source.rows if (tokens := self._tokens(row)) is not None]
            if not pairs:
                continue
            kept = [row for row, _ in pairs]
            tick = _progress(say, source.name, len(kept))
            images = resized(kept, base.processor, base.channels, cache, wider=wider, grey=are_grey(kept), tick=tick)
            self.sources.append(Lines(images, [tokens for _, tokens in pairs]))
            self.shares.append(source.share)
        for reason, count in sorted(self.left_out.items()):
            say(f"Left out    {count} lines {reason}", soft_wrap=True)
        if not self.sources:
            raise Refused("no line is left to train on: the model can write none of them (--vocabulary extend?)")
        self.longest = max(len(tokens) for source in self.sources for tokens in source.tokens)
        self.validation = self._readable("validation", material.validation, cache)
        self.tests = [self._readable(f"test: {name}", found, cache) for name, found in material.tests]

    def _tokens(self, row: rows.Row) -> list[int] | None:
        text = vocabulary.tidy(row.text, self.characters)
        unknown = set(text) - self.characters - {" "}
        if unknown:
            reason = f"with characters the model cannot write ({' '.join(sorted(unknown))})"
        else:
            ids = [*vocabulary.encode(self.base.tokenizer, text), self.base.eos_id]
            if len(ids) < self.base.position_limit:
                return ids
            reason = f"longer than the {self.base.position_limit - 2} tokens the model can write"
        self.left_out[reason] = self.left_out.get(reason, 0) + 1
        return None

    def _readable(self, name: str, found: Sequence[rows.Row], cache: Path) -> ReadingSet | None:
        if not found:
            return None
        images = resized(found, self.base.processor, self.base.channels, cache)
        return ReadingSet(name, images, [vocabulary.tidy(row.text, self.characters) for row in found])

    def measured(self) -> list[ReadingSet]:
        """All sets that are read before and after."""
        return [item for item in (self.validation, *self.tests) if item is not None]


def _progress(say: Say, name: str, count: int) -> Callable[[], None]:
    """To be called for each line that is resized; tells every ten thousand."""
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if done % 10_000 == 0:
            say(f"Resized     {done} of {count} lines of {name}", soft_wrap=True)

    return tick


def _held_out(options: Options, material: Material) -> str:
    count = len(material.validation)
    if options.validation:
        return f"{count} lines of {', '.join(Path(place).name for place in options.validation)}"
    if not count:
        return "nothing, so the last weights are kept"
    if material.split.validation_writers:
        return f"{count} lines by writers who are not trained on: {', '.join(material.split.validation_writers)}"
    return f"{count} lines, chosen by a hash of their names (there are no writers to tell apart)"
