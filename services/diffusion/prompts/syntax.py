r"""Prompts as AUTOMATIC1111's web UI reads them, parsed into what the text encoders get at every step.

(word) x 1.1 · [word] / 1.1 · (word:1.2) · [from:to:when] · [to:when] · [from::when] · [one|other] · BREAK · AND ·
<lora:name:0.8> · a backslash before one of ( ) [ ] : | \ makes it a character like any other.

Where this differs from the web UI, it is to say what is wrong: a bracket that is never closed is an error (there it
weighs all the rest of the prompt); one closed without having been opened is text, as there, for it may be a smiley.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from services.diffusion.domain import Lora

NESTING_MOST = 16  # brackets within brackets
ALTERNATIVES_MOST = 64  # of one [a|b|...]
BRANCHES_MOST = 8  # sub-prompts between ANDs; each costs an evaluation row a step
CHUNKS_MOST = 32  # parts that a text encoder reads one by one, as between BREAKs
WEIGHT_MOST = 10.0  # of words, brackets within brackets multiplied, and of sub-prompts
LORA_WEIGHT_MOST = 4.0
_BRACKET_FACTOR = 1.1

_TOKEN = re.compile(r"\\[()\[\]:|\\]|[()\[\]:|]|[^()\[\]:|\\]+|\\")
_KEYWORD = re.compile(r"\b(BREAK|AND)\b")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")
# What was surely meant as a number, and is none.
_BAD_NUMBER = re.compile(r"(?=[^\d]*\d)[\d.,eE+\-]+|[+-]?(?:nan|inf|infinity)", re.IGNORECASE)
_PARTNER = {")": "(", "]": "["}
_NAME = {"(": '"("', "[": '"["'}
_LORA = "<lora:"


class PromptError(ValueError):
    """A prompt that cannot be read. Its text says what is wrong, where (characters count from 1), and what to do."""

    def __init__(self, what: str, position: int | None = None) -> None:
        super().__init__(what if position is None else f"{what} (at character {position + 1})")


@dataclass(frozen=True)
class Fragment:
    """Words that weigh the same. weight: -WEIGHT_MOST to WEIGHT_MOST, 1 for ordinary."""

    text: str
    weight: float = 1.0


Chunk = tuple[Fragment, ...]


@dataclass(frozen=True)
class Branch:
    """One sub-prompt of AND, or the whole prompt where there is none.

    chunks: at least one; each is filled up to what the text encoder reads at once before the next begins (BREAK).
    """

    chunks: tuple[Chunk, ...]
    weight: float = 1.0

    @property
    def text(self) -> str:
        """The words without weights and boundaries."""
        return " ".join("".join(fragment.text for fragment in chunk) for chunk in self.chunks).strip()


# --- the tree that a prompt is parsed into ---


@dataclass(frozen=True)
class _Text:
    text: str
    escaped: bool = False


@dataclass(frozen=True)
class _Break:
    pass


@dataclass(frozen=True)
class _Weighted:
    body: "_Nodes"
    factor: float
    position: int


@dataclass(frozen=True)
class _Edited:
    """when: steps that `before` lasts if whole, else the part of the steps, 0 to 1."""

    before: "_Nodes"
    after: "_Nodes"
    when: float
    whole: bool

    def switch_step(self, step_count: int) -> int:
        return int(self.when if self.whole else self.when * step_count)


@dataclass(frozen=True)
class _Alternating:
    options: tuple["_Nodes", ...]


_Node = _Text | _Break | _Weighted | _Edited | _Alternating
_Nodes = tuple[_Node, ...]


@dataclass(frozen=True)
class Prompt:
    """A parsed prompt. source: as it was written."""

    source: str
    _branches: tuple[tuple[_Nodes, float], ...]

    @classmethod
    def literal(cls, text: str) -> "Prompt":
        """A prompt whose every character is text."""
        return cls(text, (((_Text(text),) if text else (), 1.0),))

    @property
    def branch_count(self) -> int:
        """Sub-prompts that AND divides it into: 1 without. Each costs one evaluation row a step."""
        return len(self._branches)

    @property
    def is_plain(self) -> bool:
        """True if it means its own characters and nothing more, so that a pipeline may take it as it stands."""
        if self.branch_count > 1:
            return False
        nodes = self._branches[0][0]
        return all(isinstance(n, _Text) for n in nodes) and self.at(0, 1)[0].chunks == _plain_chunks(self.source)

    def at(self, step: int, step_count: int) -> tuple[Branch, ...]:
        """What is painted at `step` (0-based) of `step_count`; one branch a sub-prompt, always as many."""
        return tuple(Branch(_chunks(nodes, step, step_count), weight) for nodes, weight in self._branches)

    def over(self, step_count: int) -> tuple[tuple[Branch, ...], ...]:
        """What is painted at every step, as `at` says."""
        if all(_is_static(nodes) for nodes, _ in self._branches):
            return (self.at(0, step_count),) * step_count
        return tuple(self.at(step, step_count) for step in range(step_count))

    def switches(self, step_count: int) -> tuple[int, ...]:
        """The steps (0-based, rising, never 0) at which it is not what it was the step before."""
        shown = self.over(step_count)
        return tuple(step for step in range(1, step_count) if shown[step] != shown[step - 1])


def parse(text: str, *, divided: bool = True) -> Prompt:
    """Read a prompt without wildcards and LoRAs. divided: whether AND divides; in negative prompts it is a word.

    Raises PromptError. Takes time proportional to the length of the text.
    """
    parser = _Parser(divided)
    position = 0
    for token in _TOKEN.findall(text):
        parser.take(token, position)
        position += len(token)
    prompt = Prompt(text, parser.finish())
    every = [nodes for nodes, _ in prompt._branches]
    if text.strip() and not prompt.is_plain and not any(_has_words(nodes) for nodes in every):
        raise PromptError(r"it has brackets and separators but no words; a bracket as a character is written \( or \[")
    for nodes in every:
        _check_weights(nodes, 1.0)
    if prompt.branch_count > 1:
        for number, nodes in enumerate(every, 1):
            if not _has_words(nodes):
                raise PromptError(f"sub-prompt {number} of AND has no words")
    return prompt


def take_loras(text: str) -> tuple[str, tuple[Lora, ...]]:
    """Take <lora:name:weight> and <lora:name> (weight 1) out of a prompt, each with the spaces before it.

    Answers the rest and the LoRAs in their order. Raises PromptError for a tag without end or name, and for a weight
    that is no number or beyond LORA_WEIGHT_MOST.
    """
    lowered = text.lower() if len(text.lower()) == len(text) else text
    rest: list[str] = []
    loras: list[Lora] = []
    done = 0
    while (start := lowered.find(_LORA, done)) >= 0:
        end = text.find(">", start)
        if end < 0:
            raise PromptError('a LoRA is never closed; it is written <lora:name:weight>, ">" included', start)
        loras.append(_lora(text[start + len(_LORA) : end], start))
        rest.append(text[done:start].rstrip())
        done = end + 1
    rest.append(text[done:])
    return "".join(rest), tuple(loras)


def _lora(inside: str, position: int) -> Lora:
    if "<" in inside:
        raise PromptError('a LoRA is never closed; it is written <lora:name:weight>, ">" included', position)
    name, *weights = (part.strip() for part in inside.split(":"))
    if not name:
        raise PromptError("a LoRA has no name; it is written <lora:name:weight>", position)
    if len(weights) > 1:
        raise PromptError(
            f"LoRA {name[:80]!r} has {len(weights)} weights; it takes one, as in <lora:name:0.8>", position
        )
    if not weights:
        return Lora(name)
    if not _NUMBER.fullmatch(weights[0]) or not abs(float(weights[0])) <= LORA_WEIGHT_MOST:
        raise PromptError(
            f"LoRA {name[:80]!r} has the weight {weights[0][:20]!r}; accepted: "
            f"a number from {-LORA_WEIGHT_MOST:g} to {LORA_WEIGHT_MOST:g}",
            position,
        )
    return Lora(name, float(weights[0]))


@dataclass
class _Group:
    """A bracket not yet closed, or the top of a sub-prompt (opener "").

    parts: what stands between its separators; separators: which these are.
    """

    opener: str
    position: int
    parts: list[list[_Node]] = field(default_factory=lambda: [[]])
    separators: list[str] = field(default_factory=list)

    def separate(self, separator: str) -> None:
        self.parts.append([])
        self.separators.append(separator)

    def joined(self, first: int, last: int) -> _Nodes:
        """Parts first up to and without last, the separators between them as text."""
        nodes = list(self.parts[first])
        for index in range(first + 1, last):
            nodes.append(_Text(self.separators[index - 1]))
            nodes.extend(self.parts[index])
        return tuple(nodes)

    def last_words(self) -> str | None:
        """The last part, if it is nothing but text."""
        nodes = self.parts[-1]
        if all(isinstance(node, _Text) for node in nodes):
            return "".join(node.text for node in nodes if isinstance(node, _Text)).strip()
        return None


class _Parser:
    def __init__(self, divided: bool) -> None:
        self._divided = divided
        self._stack = [_Group("", 0)]
        self._open = {"(": 0, "[": 0}
        self._branches: list[tuple[_Nodes, float]] = []
        self._break_count = 0

    def take(self, token: str, position: int) -> None:
        top = self._stack[-1]
        if token in "([":
            self._enter(token, position)
        elif token in ")]":
            self._leave(token, position)
        elif token in ":|":
            # "|" separates in square brackets only; in round ones it is text.
            if token == ":" or top.opener == "[":
                top.separate(token)
            else:
                top.parts[-1].append(_Text(token))
        elif len(token) == 2 and token[0] == "\\":
            top.parts[-1].append(_Text(token[1], escaped=True))
        else:
            for piece, at in _pieces(token, position):
                self._words(piece, at)

    def finish(self) -> tuple[tuple[_Nodes, float], ...]:
        self._refuse_open(None)
        self._end_branch(divided=bool(self._branches))
        return tuple(self._branches)

    def _words(self, piece: str, position: int) -> None:
        top = self._stack[-1]
        if piece == "BREAK":
            self._break_count += 1
            if self._break_count >= CHUNKS_MOST:
                raise PromptError(f"there are more than {CHUNKS_MOST - 1} BREAKs", position)
            top.parts[-1].append(_Break())
        elif piece == "AND" and self._divided:
            if top.opener:
                raise PromptError(
                    f"AND divides the whole prompt and cannot stand within {_NAME[top.opener]}; as a word write it in "
                    "lower case",
                    position,
                )
            self._end_branch(divided=True)
            if len(self._branches) >= BRANCHES_MOST:
                raise PromptError(f"AND divides it into more than {BRANCHES_MOST} sub-prompts", position)
            self._stack[-1] = _Group("", position)
        else:
            top.parts[-1].append(_Text(piece))

    def _enter(self, opener: str, position: int) -> None:
        if len(self._stack) > NESTING_MOST:
            raise PromptError(f"brackets stand more than {NESTING_MOST} deep within each other", position)
        self._stack.append(_Group(opener, position))
        self._open[opener] += 1

    def _leave(self, closer: str, position: int) -> None:
        opener = _PARTNER[closer]
        if not self._open[opener]:
            self._stack[-1].parts[-1].append(_Text(closer))
            return
        if self._stack[-1].opener != opener:
            self._refuse_open(closer)
        group = self._stack.pop()
        self._open[opener] -= 1
        node = _round(group) if opener == "(" else _square(group)
        self._stack[-1].parts[-1].append(node)

    def _refuse_open(self, closer: str | None) -> None:
        group = self._stack[-1]
        if group.opener:
            until = "never closed" if closer is None else f'not closed before the "{closer}" around it'
            raise PromptError(
                f"the {_NAME[group.opener]} is {until}; close it, or write \\{group.opener} for the character",
                group.position,
            )

    def _end_branch(self, *, divided: bool) -> None:
        group = self._stack[-1]
        weight = _trailing_number(group) if divided else None
        if weight is None:
            self._branches.append((group.joined(0, len(group.parts)), 1.0))
            return
        if abs(weight) > WEIGHT_MOST:
            raise _weight_error("a sub-prompt", weight, group.position)
        self._branches.append((group.joined(0, len(group.parts) - 1), weight))


def _pieces(token: str, position: int) -> Iterator[tuple[str, int]]:
    """Split a run of text at BREAK and AND."""
    for piece in _KEYWORD.split(token):
        if piece:
            yield piece, position
        position += len(piece)


def _trailing_number(group: _Group) -> float | None:
    """The number after the last colon of a group; None if there stands something else.

    Raises PromptError for what was surely meant as a number.
    """
    if not group.separators or group.separators[-1] != ":":
        return None
    words = group.last_words()
    if words is None:
        return None
    if _NUMBER.fullmatch(words):
        return float(words)
    if not words and group.opener:
        raise PromptError(
            f"the {_NAME[group.opener]} has no number after its last colon; a colon as a character is written \\:",
            group.position,
        )
    if _BAD_NUMBER.fullmatch(words):
        raise PromptError(
            f"{words[:20]!r} after the colon is not a number such as 1.2; a colon as a character is written \\:",
            group.position,
        )
    return None


def _round(group: _Group) -> _Node:
    number = _trailing_number(group)
    if number is None:
        return _Weighted(group.joined(0, len(group.parts)), _BRACKET_FACTOR, group.position)
    return _Weighted(group.joined(0, len(group.parts) - 1), number, group.position)


def _square(group: _Group) -> _Node:
    if "|" in group.separators:
        # Among alternatives a colon is text.
        bounds = [0, *(i + 1 for i, separator in enumerate(group.separators) if separator == "|"), len(group.parts)]
        options = tuple(group.joined(first, last) for first, last in zip(bounds, bounds[1:], strict=False))
        if len(options) > ALTERNATIVES_MOST:
            raise PromptError(f"there are {len(options)} alternatives; at most {ALTERNATIVES_MOST}", group.position)
        return _Alternating(options)
    when = _trailing_number(group)
    colons = len(group.separators)
    if when is None and colons < 2:
        return _Weighted(group.joined(0, len(group.parts)), 1 / _BRACKET_FACTOR, group.position)
    if when is None or colons > 2:
        raise PromptError(
            "several colons in square brackets mean [from:to:when], when being a number; a colon as a character is "
            "written \\:",
            group.position,
        )
    digits = group.last_words() or ""
    whole = "." not in digits and when >= 1
    if when < 0 or (not whole and when > 1):
        raise PromptError(
            f"{digits[:20]!r} is no time of a change: a part of the steps from 0 to 1, such as 0.5, or a step from 1, "
            "such as 10; words are weighed in round brackets, as (word:1.2)",
            group.position,
        )
    before = tuple(group.parts[0]) if colons == 2 else ()
    # Beyond any step count, yet an integer also where the digits run into infinity.
    return _Edited(before, tuple(group.parts[-2]), min(when, 1e9), whole)


# --- from the tree to fragments ---


def _chunks(nodes: _Nodes, step: int, step_count: int) -> tuple[Chunk, ...]:
    runs: list[list[tuple[list[str], float]]] = [[]]
    _flatten(nodes, 1.0, step, step_count, runs)
    chunks = [tuple(Fragment("".join(texts), weight) for texts, weight in run) for run in runs]
    if len(chunks) == 1:
        return (chunks[0],)
    chunks = [tuple(f for f in chunk if f.text.strip()) for chunk in chunks]
    if not chunks[-1]:
        chunks.pop()
    return tuple(_trimmed(chunk) for chunk in chunks)


def _flatten(
    nodes: _Nodes, weight: float, step: int, step_count: int, runs: list[list[tuple[list[str], float]]]
) -> None:
    """Append to runs (one a chunk) the texts that show at a step, those of equal weight side by side together."""
    for node in nodes:
        match node:
            case _Text(text):
                run = runs[-1]
                if run and run[-1][1] == weight:
                    run[-1][0].append(text)
                else:
                    run.append(([text], weight))
            case _Break():
                runs.append([])
            case _Weighted(body, factor):
                _flatten(body, weight * factor, step, step_count, runs)
            case _Edited(before, after):
                shown = after if step >= node.switch_step(step_count) else before
                _flatten(shown, weight, step, step_count, runs)
            case _Alternating(options):
                _flatten(options[step % len(options)], weight, step, step_count, runs)


def _trimmed(chunk: Chunk) -> Chunk:
    """Without the spaces around the BREAKs."""
    if not chunk:
        return chunk
    if len(chunk) == 1:
        return (Fragment(chunk[0].text.strip(), chunk[0].weight),)
    first, *middle, last = chunk
    return (Fragment(first.text.lstrip(), first.weight), *middle, Fragment(last.text.rstrip(), last.weight))


def _plain_chunks(text: str) -> tuple[Chunk, ...]:
    return ((Fragment(text),),) if text else ((),)


def _children(node: _Node) -> tuple[_Nodes, ...]:
    match node:
        case _Weighted(body):
            return (body,)
        case _Edited(before, after):
            return (before, after)
        case _Alternating(options):
            return options
    return ()


def _is_static(nodes: _Nodes) -> bool:
    return not any(isinstance(n, _Edited | _Alternating) or not all(map(_is_static, _children(n))) for n in nodes)


def _has_words(nodes: _Nodes) -> bool:
    for node in nodes:
        if isinstance(node, _Text) and (node.escaped or node.text.strip("()[]|: \t\r\n")):
            return True
        if any(map(_has_words, _children(node))):
            return True
    return False


def _check_weights(nodes: _Nodes, weight: float) -> None:
    for node in nodes:
        inner = weight
        if isinstance(node, _Weighted):
            inner = weight * node.factor
            if not abs(inner) <= WEIGHT_MOST:
                raise _weight_error("words", inner, node.position)
        for child in _children(node):
            _check_weights(child, inner)


def _weight_error(what: str, weight: float, position: int) -> PromptError:
    return PromptError(
        f"{what} of weight {weight:.4g}; accepted: {-WEIGHT_MOST:g} to {WEIGHT_MOST:g}, with all the brackets around "
        "multiplied",
        position,
    )
