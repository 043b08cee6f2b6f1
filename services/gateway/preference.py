"""What a caller asks of the hardware: metadata `inkwell-hardware: cuda, rocm, cpu`."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

from services.kit import faults

KEY = "inkwell-hardware"
# The labels of the whole house: what services report, what pools carry, what callers ask for.
LABELS = ("cuda", "rocm", "xpu", "mps", "directml", "cpu")
_LONGEST = 200


@dataclass(frozen=True, slots=True)
class Preference:
    """An order of hardware labels."""

    labels: tuple[str, ...] = ()  # best first, no label twice
    strict: bool = False  # only these labels; otherwise the labels not listed come after them

    def order(self, default: Iterable[str]) -> tuple[str, ...]:
        """Every label that may serve the call, best first; `default` orders the labels the caller did not list."""
        if self.strict:
            return self.labels
        return self.labels + tuple(label for label in default if label not in self.labels)


NO_PREFERENCE = Preference()


def from_metadata(metadata: Iterable[tuple[str, str | bytes]]) -> Preference:
    """The preference in a call's metadata; several entries read as one list, as in HTTP. Raises Fault if malformed."""
    values = [value for key, value in metadata if key == KEY]
    if not values:
        return NO_PREFERENCE
    return parse(",".join(v if isinstance(v, str) else v.decode("ascii", "replace") for v in values))


@functools.lru_cache(maxsize=256)
def parse(text: str) -> Preference:
    """Read "cuda, rocm, cpu" (an order) or "cuda!" (only that).

    A `!` on any label makes the whole list strict: "cuda, rocm!" is cuda, else rocm, and nothing else. Case and blanks
    do not matter, and of a label named twice the first place counts. Raises Fault (INVALID_ARGUMENT) for an empty
    list, an empty entry or an unknown label.
    """
    field = f"metadata.{KEY}"
    accepted = f"accepted: a list of {', '.join(LABELS)}, best first; `!` after a label means nothing but the list"
    if len(text) > _LONGEST:
        raise faults.invalid_field(field, f"{len(text)} characters are more than the limit of {_LONGEST}; {accepted}")
    labels: list[str] = []
    strict = False
    for entry in text.split(","):
        label = entry.strip().lower()
        if label.endswith("!"):
            strict = True
            label = label[:-1].rstrip()
        if label not in LABELS:
            what = f"{label[:40]!r} is not a hardware label" if label else "an entry is empty"
            raise faults.invalid_field(field, f"{what}; {accepted}", reason="UNKNOWN_HARDWARE")
        if label not in labels:
            labels.append(label)
    return Preference(tuple(labels), strict)
