"""The accuracy-aware search: which layers of a quantized model return to float, so that its quality holds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


class BudgetError(Exception):
    """No choice of layers holds the budget; the message has the figures."""


@dataclass(frozen=True)
class Limit:
    """What a quality has to be. at_least: value >= limit is asked for, else value <= limit."""

    name: str
    limit: float
    at_least: bool
    unit: str = ""

    def holds(self, value: float) -> bool:
        """Whether a measured value is within it; not-a-number never is."""
        return value >= self.limit if self.at_least else value <= self.limit

    def told(self, value: float) -> str:
        """The value and the limit in words."""
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.name} {value:.4g}{unit} (at {'least' if self.at_least else 'most'} {self.limit:.4g}{unit})"


@dataclass(frozen=True)
class Found:
    """The outcome. kept: layers that stay in float; value: the quality without them."""

    kept: frozenset[str]
    value: float
    tries: int


def search(
    rank: Callable[[], Sequence[str]],
    evaluate: Callable[[frozenset[str]], float],
    limit: Limit,
    say: Callable[[str], None],
) -> Found:
    """Put the most harmful layers back, as few as possible, until the limit holds.

    rank: answers all layers that may return to float, the most harmful first; asked when one has to. evaluate: the
    quality of the model with these layers in float, taken to get no worse with more of them. It is called once when
    none has to go back, and about 2 * log2(n) + 2 times to put n back. Raises BudgetError when not even all layers in
    float hold the limit.
    """
    tries = 0
    ranking: Sequence[str] = ()

    def measured(count: int) -> float:
        nonlocal tries
        tries += 1
        value = evaluate(frozenset(ranking[:count]))
        what = "all layers quantized" if count == 0 else f"{count} of {len(ranking)} layers in float"
        say(f"try {tries}: {what}: {limit.told(value)}{'' if limit.holds(value) else ', not enough'}")
        return value

    value = measured(0)
    if limit.holds(value):
        return Found(frozenset(), value, tries)
    ranking = rank()
    # Doubling first: it is mostly a few layers that do the harm, and each more is paid for in bytes.
    failed, held = 0, 0
    while not held:
        if failed == len(ranking):
            raise BudgetError(
                f"even with all {len(ranking)} layers in float, {limit.told(value)}: rounding is not what does the"
                " harm; widen the budget, or choose another precision"
            )
        count = min(max(1, 2 * failed), len(ranking))
        value = measured(count)
        if limit.holds(value):
            held = count
        else:
            failed = count
    best = value
    while held - failed > 1:
        middle = (held + failed) // 2
        value = measured(middle)
        if limit.holds(value):
            held, best = middle, value
        else:
            failed = middle
    return Found(frozenset(ranking[:held]), best, tries)
