"""Prompts to paint, a folder's own or ones that any model of pictures takes."""

from pathlib import Path

PROMPTS = "prompts.txt"
_OWN = (
    "grinning face",
    "a red apple on a table",
    "cat",
    "house by a lake",
    "sun behind a cloud",
    "a sailing boat",
    "birthday cake",
    "an old bicycle",
    "red heart",
    "a tree in autumn",
    "fish",
    "a cup of coffee",
    "rocket",
    "mountain in the snow",
    "dog",
    "a bunch of flowers",
)
# A file of these beside a checkpoint names what it was taught, one name a line.
_NAMES = "names.txt"


class PromptsError(Exception):
    """A folder of prompts that cannot be used; the message says why."""


def prompts_for(folder: str, checkpoint: Path, count: int) -> tuple[list[str], list[str]]:
    """Prompts to calibrate on, and others to judge by, at most `count` of each.

    folder: one with prompts.txt, a prompt a line, every second of which is calibrated on; "" for the names beside the
    checkpoint, or common ones. Raises PromptsError.
    """
    if folder:
        found = _lines(Path(folder) / PROMPTS)
        if len(found) < 2:
            raise PromptsError(f"{folder}: {PROMPTS} has {len(found)} prompts; two at least, one a line, are needed")
    elif (checkpoint / _NAMES).is_file():
        found = _lines(checkpoint / _NAMES)
    else:
        found = list(_OWN)
    return _evenly(found[1::2], count), _evenly(found[::2], count)


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptsError(f"{file} cannot be read: {error}; it has to hold a prompt a line") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _evenly(prompts: list[str], count: int) -> list[str]:
    if len(prompts) <= count:
        return prompts
    return [prompts[number * len(prompts) // count] for number in range(count)]
