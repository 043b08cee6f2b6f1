"""Language tags (BCP 47, RFC 5646) and which model a caller's language hints choose."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

TAG_LENGTH_MOST = 35  # what RFC 5646 section 4.4.1 asks software to allow for
HINTS_MOST = 16

# RFC 5646 section 2.1: a language with its extensions, script, region, variants, extensions, private use; or private
# use alone. The few irregular tags registered before (such as "i-klingon") are left out.
_TAG = re.compile(
    r"(?:[a-z]{2,3}(?:-[a-z]{3}){0,3}|[a-z]{4,8})"
    r"(?:-[a-z]{4})?"
    r"(?:-(?:[a-z]{2}|[0-9]{3}))?"
    r"(?:-(?:[a-z0-9]{5,8}|[0-9][a-z0-9]{3}))*"
    r"(?:-[a-wyz0-9](?:-[a-z0-9]{2,8})+)*"
    r"(?:-x(?:-[a-z0-9]{1,8})+)?"
    r"|x(?:-[a-z0-9]{1,8})+",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Speaker:
    """A model as the choice sees it."""

    name: str
    languages: tuple[str, ...]  # tags that it declares
    is_loaded: bool
    is_default: bool


def is_tag(tag: str) -> bool:
    """Whether it is well-formed; case does not matter."""
    return len(tag) <= TAG_LENGTH_MOST and _TAG.fullmatch(tag) is not None


def primary(tag: str) -> str:
    """The language itself, without script, region and the like: "uk" of "uk-UA"."""
    return tag.lower().partition("-")[0]


def choose(hints: Sequence[str], models: Iterable[Speaker]) -> str | None:
    """The model of the first hint that one declares, None when none does.

    The very tag counts before another tag of the same language; among equals a loaded model before one that is not,
    then the default model, then the order given.
    """
    ranked = sorted(models, key=lambda model: (not model.is_loaded, not model.is_default))
    for hint in hints:
        for form in (str.lower, primary):
            for model in ranked:
                if form(hint) in map(form, model.languages):
                    return model.name
    return None


def known(models: Iterable[Speaker]) -> list[str]:
    """Every declared tag once, sorted."""
    return sorted({tag for model in models for tag in model.languages})
