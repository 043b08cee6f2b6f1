"""From the prompts as they were asked for to those that are painted: styles, then wildcards, then LoRAs out."""

from collections.abc import Sequence
from dataclasses import dataclass

from services.diffusion.domain import Lora, PromptSyntax
from services.diffusion.prompts import styles as style_table
from services.diffusion.prompts.syntax import PromptError, parse, take_loras
from services.diffusion.prompts.wildcards import Wildcards
from services.diffusion.settings import Settings
from services.kit.faults import FieldViolation


@dataclass(frozen=True)
class Resolved:
    """What a picture's prompts come to.

    prompt, negative_prompt: styles and wildcards filled in, LoRAs taken out, no longer than the setting allows.
    prompt_template, negative_prompt_template: as asked for where styles or wildcards changed them, else empty.
    loras: those of the prompt, in its order. wildcards_drawn: whether the seed decided anything.
    branch_count: sub-prompts of AND, each of which costs an evaluation row a step; 1 without.
    violations: what is wrong, by field; nothing else here is to be used where there are any.
    """

    prompt: str
    negative_prompt: str
    prompt_template: str = ""
    negative_prompt_template: str = ""
    loras: tuple[Lora, ...] = ()
    wildcards_drawn: bool = False
    branch_count: int = 1
    violations: tuple[FieldViolation, ...] = ()


def resolve(
    prompt: str,
    negative_prompt: str,
    styles: Sequence[str],
    syntax: PromptSyntax,
    wildcard_seed: int,
    settings: Settings,
) -> Resolved:
    """Fill in and check one picture's prompts. With syntax "plain" only styles are laid on; all else is text.

    Raises Fault: NOT_FOUND for an unknown style or wildcard, INVALID_ARGUMENT for styles where there are none,
    FAILED_PRECONDITION for a styles file that cannot be used. Everything else is in `violations`.
    """
    chosen = style_table.find(styles, settings.styles_file)
    wildcards = Wildcards(settings.wildcard_folder, wildcard_seed)
    most = settings.max_prompt_bytes
    violations: list[FieldViolation] = []
    loras: tuple[Lora, ...] = ()
    branch_count = 1
    filled: dict[str, str] = {}
    templates: dict[str, str] = {}
    for field, asked, laid_on in (
        ("prompt", prompt, [style.prompt for style in chosen]),
        ("negative_prompt", negative_prompt, [style.negative_prompt for style in chosen]),
    ):
        text = asked
        try:
            text = _with_styles(text, laid_on, most)
            if syntax == "weighted":
                text = wildcards.fill_in(text, field, characters_most=most)
            templates[field] = asked if text != asked else ""
            if syntax == "weighted":
                text, found = take_loras(text)
                branches = parse(text, divided=field == "prompt").branch_count
                if field == "prompt":
                    loras, branch_count = found, branches
                elif found:
                    raise PromptError(f"the LoRA {found[0].name[:80]!r} stands here; LoRAs belong into the prompt")
            if (size := len(text.encode())) > most:
                raise PromptError(f"filled in it has {size} bytes, more than the limit of {most}")
        except PromptError as error:
            violations.append(FieldViolation(field, str(error)))
        filled[field] = text
    return Resolved(
        filled["prompt"],
        filled["negative_prompt"],
        templates.get("prompt", ""),
        templates.get("negative_prompt", ""),
        loras,
        wildcards.drawn,
        branch_count,
        tuple(violations),
    )


def _with_styles(text: str, laid_on: Sequence[str], most: int) -> str:
    for style in laid_on:
        # A style may repeat the prompt, and the next repeat that: look before it has grown.
        if len(style) + style.count(style_table.PLACE) * (len(text) - len(style_table.PLACE)) > most:
            raise PromptError(f"with its styles laid on it has more than the limit of {most} bytes")
        text = style_table.apply(text, [style])
    return text
