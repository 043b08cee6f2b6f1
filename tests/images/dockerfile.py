"""Reads Dockerfiles, and what .dockerignore lets in, as far as the project's own use them."""

import fnmatch
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("gateway", "ocr", "diffusion", "compiler")
MODEL_SERVICES = SERVICES[1:]
HARDWARE = ("cpu", "cuda", "rocm")


@dataclass(frozen=True)
class Instruction:
    """One instruction: `RUN --mount=… command` has the word RUN, the flag mount, and the command as its text."""

    word: str
    flags: dict[str, str]
    text: str

    def words(self) -> list[str]:
        """Its arguments: of the JSON form, else as a shell would split them."""
        return list(json.loads(self.text)) if self.text.startswith("[") else shlex.split(self.text)


@dataclass(frozen=True)
class Stage:
    """From one FROM to the next."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)

    def of(self, word: str) -> list[Instruction]:
        """Its instructions of one kind."""
        return [instruction for instruction in self.instructions if instruction.word == word]


@dataclass(frozen=True)
class Dockerfile:
    """A file of stages; each is built on an image or on one of those before it."""

    stages: dict[str, Stage]

    def chain(self, name: str) -> list[Stage]:
        """The stage and those that it is built on, the first one first: what its image consists of."""
        stage = self.stages[name]
        return [*self.chain(stage.base), stage] if stage.base in self.stages else [stage]

    def of(self, name: str, word: str) -> list[Instruction]:
        """The instructions of one kind that an image comes about by, in order."""
        return [instruction for stage in self.chain(name) for instruction in stage.of(word)]

    def environment(self, name: str) -> dict[str, str]:
        """What an image sets, and by other names what it is labelled with."""
        return _pairs(self.of(name, "ENV"))

    def labels(self, name: str) -> dict[str, str]:
        """The labels of an image, with the defaults of the build's arguments put in."""
        arguments = _pairs(self.of(name, "ARG"))
        return {
            key: re.sub(r"\$(\w+)", lambda found: arguments[found[1]], value)
            for key, value in _pairs(self.of(name, "LABEL")).items()
        }


def _pairs(instructions: list[Instruction]) -> dict[str, str]:
    pairs = (word.partition("=") for instruction in instructions for word in instruction.words())
    return {key: value for key, _, value in pairs}


def read(service: str) -> Dockerfile:
    """The Dockerfile of a service."""
    return parse((ROOT / "services" / service / "Dockerfile").read_text("utf-8"))


def parse(text: str) -> Dockerfile:
    """Raises ValueError for an instruction before the first FROM, or a FROM without AS."""
    stages: dict[str, Stage] = {}
    current: Stage | None = None
    for line in _lines(text):
        word, rest = line.split(maxsplit=1)
        flags = {found[1]: found[2] for found in re.finditer(r"--(\w+)=(\S+)", _leading_flags(rest))}
        instruction = Instruction(word.upper(), flags, rest[len(_leading_flags(rest)) :].strip())
        if instruction.word == "FROM":
            base, as_, name = instruction.text.split()
            if as_.upper() != "AS":
                raise ValueError(f"a stage without a name: {line}")
            current = stages[name] = Stage(name, base)
        elif current is None:
            raise ValueError(f"before the first FROM: {line}")
        else:
            current.instructions.append(instruction)
    return Dockerfile(stages)


def _leading_flags(rest: str) -> str:
    found = re.match(r"(?:\s*--\w+=\S+)*", rest)
    return found[0] if found else ""


def _lines(text: str) -> Iterator[str]:
    """Instructions, each on one line: without comments, continued lines joined."""
    joined = ""
    for line in text.splitlines():
        if line.lstrip().startswith("#") or not (joined or line.strip()):
            continue
        joined += line
        if joined.endswith("\\"):
            joined = joined[:-1]
            continue
        yield joined.strip()
        joined = ""


class Ignore:
    """What a .dockerignore leaves of a context."""

    def __init__(self, text: str) -> None:
        lines = [line.strip() for line in text.splitlines()]
        self._rules = [line for line in lines if line and not line.startswith("#")]

    def lets_in(self, path: PurePosixPath) -> bool:
        """Whether a file of the context is given to the build; the last rule that is about it decides."""
        let_in = True
        for rule in self._rules:
            pattern = rule.removeprefix("!")
            if any(_matches(place, pattern) for place in (path, *path.parents) if place.name):
                let_in = rule.startswith("!")
        return let_in


def _matches(path: PurePosixPath, pattern: str) -> bool:
    if pattern.startswith("**/"):
        return fnmatch.fnmatchcase(path.name, pattern.removeprefix("**/"))
    parts, patterns = path.parts, PurePosixPath(pattern).parts
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def ignore() -> Ignore:
    """The project's own."""
    return Ignore((ROOT / ".dockerignore").read_text("utf-8"))
