"""What `inkwell paint` is asked for: its options, laid over the parameters of the picture to repeat."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import typer

from inkwell import repeating, types
from inkwell.cli import report
from inkwell.cli.values import PictureGiven
from inkwell.embedded import embedded_parameters

Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Given:
    """The options as they were typed; None for what was left out.

    plain: options of `AsyncClient.paint_stream` that stand alone. parts: those that are dataclasses, field by field.
    """

    prompt: str | None
    plain: Values
    parts: Mapping[str, Values]
    image: bytes | None = None
    mask: bytes | None = None
    controls: Sequence[PictureGiven] = ()
    image_prompts: Sequence[PictureGiven] = ()
    loras: Sequence[types.Lora] = ()


# Dataclass of a part; and, of each group of its fields, one must be given where there is no part to lay the rest over.
_PARTS: dict[str, tuple[type, tuple[tuple[str, ...], ...]]] = {
    "outpaint": (types.Outpaint, (("left_px",),)),
    "hires": (types.Hires, (("scale", "width"),)),
    "refiner": (types.Refiner, (("model",),)),
    "sampling": (types.Sampling, ()),
    "perturbed_attention": (types.PerturbedAttention, (("scale",),)),
    "variation": (types.Variation, (("seed",), ("strength",))),
    "vae": (types.Vae, ()),
}


def combined(given: Given, like: Path | None) -> tuple[str, types.PaintOptions]:
    """The prompt and the options for `AsyncClient.paint_stream`: those of the picture `like`, overridden by the given.

    Raises BadParameter where `like` cannot be read, carries no parameters, or was made from pictures that are not
    given; tells on stderr which of them are others.
    """
    if like is None:
        if given.prompt is None:
            raise typer.BadParameter("say what to paint, or give --like FILE", param_hint="PROMPT")
        embedded = None
        options: dict[str, Any] = {}
    else:
        embedded = _embedded(like)
        _compare(like, embedded, given)
        options = dict(repeating.settings(embedded))
    _steps_by_hand(options, given)
    _exclusive(options, given)
    parts = _with_edges(options, given)
    for name, (kind, needs) in _PARTS.items():
        options[name] = _laid(name, kind, needs, options.get(name), parts.get(name, {}))
    options["image"] = given.image
    mask = None
    if embedded is not None and embedded.inpaint is not None and given.mask is not None:
        mask = repeating.inpaint(embedded.inpaint, given.mask)
    options["inpaint"] = _laid("inpaint", types.Inpaint, (("mask",),), mask, {"mask": given.mask, **parts["inpaint"]})
    options["controls"] = _controls(embedded.controls if embedded else (), given.controls)
    options["image_prompts"] = _image_prompts(embedded.image_prompts if embedded else (), given.image_prompts)
    options["loras"] = given.loras or options.get("loras", ())
    options |= {name: value for name, value in given.plain.items() if value is not None}
    prompt = given.prompt if given.prompt is not None else embedded.prompt if embedded else ""
    return prompt, cast(types.PaintOptions, options)


def _embedded(like: Path) -> types.GenerationParameters:
    try:
        return embedded_parameters(like)
    except OSError as error:
        raise typer.BadParameter(f"cannot read {str(like)!r}: {error.strerror}", param_hint="--like") from None
    except ValueError as error:
        raise typer.BadParameter(f"{str(like)!r}: {error}", param_hint="--like") from None


def _compare(like: Path, embedded: types.GenerationParameters, given: Given) -> None:
    """The pictures that went into `like`, by their digests, against those given."""
    slots: list[tuple[str, str, bytes | None]] = [("--image", embedded.image_sha256, given.image)]
    if embedded.inpaint is not None and not _outpaints(given):
        slots.append(("--mask", embedded.inpaint.mask_sha256, given.mask))
    for option, digests, came in (
        ("--control", [each.image_sha256 for each in embedded.controls], given.controls),
        ("--image-prompt", [each.image_sha256 for each in embedded.image_prompts], given.image_prompts),
    ):
        for place, digest in enumerate(digests):
            number = f" number {place + 1}" if len(digests) > 1 else ""
            slots.append((option + number, digest, came[place].content if place < len(came) else None))
    wanted = [slot for slot in slots if slot[1]]
    missing = [f"{what} (SHA-256 {digest})" for what, digest, content in wanted if content is None]
    if missing:
        raise typer.BadParameter(
            f"{str(like)!r} was painted from pictures that it does not hold; give them, too: {', '.join(missing)}",
            param_hint="--like",
        )
    for what, digest, content in wanted:
        if content is not None and repeating.sha256(content) != digest:
            report.note(
                f"{what} is not the picture that went into {like}: its SHA-256 is {repeating.sha256(content)},"
                f" not {digest}"
            )


def _steps_by_hand(options: dict[str, Any], given: Given) -> None:
    # Steps are a count or by hand; what is typed rules over what the picture had.
    sampling = given.parts.get("sampling", {})
    by_hand = [name for name in ("timesteps", "sigmas") if sampling.get(name)]
    if by_hand and given.plain.get("steps") is not None:
        raise typer.BadParameter("the steps are given by hand; leave their count out", param_hint="--steps")
    if len(by_hand) > 1:
        raise typer.BadParameter("steps by hand are time steps or noise levels, not both", param_hint="--timesteps")
    if by_hand:
        options["steps"] = None
    embedded = options.get("sampling")
    if embedded is not None and (by_hand or given.plain.get("steps") is not None):
        options["sampling"] = dataclasses.replace(embedded, timesteps=(), sigmas=())


def _exclusive(options: dict[str, Any], given: Given) -> None:
    # A mask and edges exclude each other, as do a scale and a size of the second pass.
    if given.mask is not None and not _outpaints(given):
        options["outpaint"] = None
    hires = given.parts.get("hires", {})
    if options.get("hires") is not None and (hires.get("scale") or hires.get("width")):
        options["hires"] = dataclasses.replace(options["hires"], scale=None, width=None, height=None)


def _with_edges(options: Values, given: Given) -> dict[str, Values]:
    # Softness and fill speak of the mask or, where there is none, of the old edges.
    parts = {"inpaint": {}, "outpaint": {}, **given.parts}
    if given.mask is None and (_outpaints(given) or options.get("outpaint") is not None):
        both = {name: parts["inpaint"].get(name) for name in ("blur_px", "fill")}
        parts["outpaint"] = {**parts["outpaint"], **both}
        parts["inpaint"] = {name: value for name, value in parts["inpaint"].items() if name not in both}
    return parts


def _outpaints(given: Given) -> bool:
    return given.parts.get("outpaint", {}).get("left_px") is not None


def _laid(name: str, kind: type, needs: Sequence[Sequence[str]], base: Any, values: Values) -> Any:
    """`base` with those of `values` that are given; None where there is neither."""
    known = {key: value for key, value in values.items() if value is not None}
    if not known:
        return base
    if base is not None:
        return dataclasses.replace(base, **known)
    for group in needs:
        if not any(key in known for key in group):
            first = report.option(f"{name}.{next(iter(known))}")
            raise typer.BadParameter(f"it goes with {report.option(f'{name}.{group[0]}')}", param_hint=first)
    return kind(**known)


def _controls(embedded: Sequence[types.ControlParameters], given: Sequence[PictureGiven]) -> list[types.Control]:
    def base(place: int, content: bytes) -> types.Control:
        return repeating.control(embedded[place], content) if place < len(embedded) else types.Control(content)

    return [dataclasses.replace(base(place, each.content), **each.changes("model")) for place, each in enumerate(given)]


def _image_prompts(
    embedded: Sequence[types.ImagePromptParameters], given: Sequence[PictureGiven]
) -> list[types.ImagePrompt]:
    def base(place: int, content: bytes) -> types.ImagePrompt:
        return repeating.image_prompt(embedded[place], content) if place < len(embedded) else types.ImagePrompt(content)

    return [
        dataclasses.replace(base(place, each.content), **each.changes("adapter")) for place, each in enumerate(given)
    ]
