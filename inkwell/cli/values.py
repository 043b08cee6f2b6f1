"""The texts behind the options of `inkwell paint`, read; each function raises BadParameter for what it cannot read."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from inkwell import types
from inkwell.cli.reading import sources
from inkwell.files import load


@dataclass(frozen=True, slots=True)
class PictureGiven:
    """One --control or --image-prompt: [NAME=]FILE and what was set behind it."""

    name: str
    content: bytes
    settings: Mapping[str, Any]

    def changes(self, key: str) -> dict[str, Any]:
        """What was set, with the name as `key`."""
        return {key: self.name, **self.settings} if self.name else dict(self.settings)


def picture(argument: str | None, option: str) -> bytes | None:
    """A file's bytes, '-' for stdin; raises BadParameter if it cannot be read."""
    if argument is None:
        return None
    ((_, source),) = sources([argument], option)
    return load(source, field=option)


Settings = Mapping[str, Callable[[str], object]]
CONTROL_SETTINGS: Settings = {"preprocessor": str, "scale": float, "start": float, "end": float}
IMAGE_PROMPT_SETTINGS: Settings = {"scale": float}


def picture_with_settings(text: str, known: Settings, option: str) -> PictureGiven:
    """[NAME=]FILE[,SETTING=VALUE …] with the settings `known`; the file's name may hold commas."""
    head = text
    found: dict[str, object] = {}
    while match := re.fullmatch(rf"(.*),({'|'.join(known)})=([^,]*)", head, flags=re.DOTALL):
        head, key, value = match.groups()
        if key in found:
            raise typer.BadParameter(f"{text!r} sets {key} twice", param_hint=option)
        try:
            found[key] = known[key](value)
        except ValueError:
            raise typer.BadParameter(f"{text!r}: {key} must be a number, not {value!r}", param_hint=option) from None
    name, named, file = head.partition("=")
    if not named:
        name, file = "", head
    unknown = re.search(r",\s*(\w+)=", head)
    if unknown and not Path(file).is_file():
        raise typer.BadParameter(f"{text!r}: {unknown[1]!r} is none of {', '.join(known)}", param_hint=option)
    if not file:
        raise typer.BadParameter(f"{text!r} names no file; [NAME=]FILE is what it takes", param_hint=option)
    content = picture(file, option)
    assert content is not None
    return PictureGiven(name, content, found)


def lora(text: str) -> types.Lora:
    """NAME or NAME:WEIGHT."""
    name, colon, weight = text.rpartition(":")
    if not colon:
        return types.Lora(text)
    try:
        return types.Lora(name, float(weight))
    except ValueError:
        raise typer.BadParameter(f"{text!r}: the weight {weight!r} is no number", param_hint="--lora") from None


def size(text: str | None, option: str = "--size") -> tuple[int | None, int | None]:
    """WIDTHxHEIGHT."""
    if text is None:
        return None, None
    match = re.fullmatch(r"(\d{1,9})[xX×](\d{1,9})", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not WIDTHxHEIGHT in pixels, such as 64x64", param_hint=option)
    return int(match[1]), int(match[2])


def hires(text: str | None) -> dict[str, float | int | None]:
    """A factor, or WIDTHxHEIGHT."""
    if text is None:
        return {}
    try:
        return {"scale": float(text)}
    except ValueError:
        pass
    try:
        width, height = size(text)
    except typer.BadParameter:
        raise typer.BadParameter(
            f"{text!r} is no factor such as 2, nor WIDTHxHEIGHT in pixels", param_hint="--hires"
        ) from None
    return {"width": width, "height": height}


def outpaint(text: str | None) -> dict[str, int]:
    """LEFT,TOP,RIGHT,BOTTOM."""
    if text is None:
        return {}
    sides = numbers(text, int, "--outpaint")
    if len(sides) != 4:
        raise typer.BadParameter(f"{text!r} is not LEFT,TOP,RIGHT,BOTTOM in pixels", param_hint="--outpaint")
    return dict(zip(("left_px", "top_px", "right_px", "bottom_px"), sides, strict=True))


def freeu(text: str | None) -> types.FreeU | None:
    """ "on", or S1,S2,B1,B2."""
    if text is None or text == "on":
        return None if text is None else types.FreeU()
    factors = numbers(text, float, "--freeu")
    if len(factors) != 4:
        raise typer.BadParameter(f"{text!r} is neither 'on' nor S1,S2,B1,B2", param_hint="--freeu")
    return types.FreeU(*factors)


def sigmas(text: str | None) -> dict[str, object]:
    """The name of a schedule, or noise levels."""
    if text is None:
        return {}
    if text in tuple(types.SigmaSchedule):
        return {"sigma_schedule": text}
    try:
        return {"sigmas": numbers(text, float, "--sigmas")}
    except typer.BadParameter:
        names = ", ".join(types.SigmaSchedule)
        raise typer.BadParameter(
            f"{text!r} is none of {names}, nor noise levels such as 14.6,3.2,0.4", param_hint="--sigmas"
        ) from None


def numbers(text: str, kind: Callable[[str], Any], option: str) -> tuple[Any, ...]:
    """Several, between commas."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        whole = "whole numbers" if kind is int else "numbers"
        raise typer.BadParameter(f"{text!r} is not {whole} between commas", param_hint=option) from None
