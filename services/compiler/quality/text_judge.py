"""Judges a TrOCR-style model by what it reads."""

from collections.abc import Callable
from pathlib import Path

from services.compiler.domain import CompileRequest
from services.compiler.export.exported import Exported
from services.compiler.quality.judge import Sessions
from services.compiler.quality.lines import Line, evenly
from services.compiler.quality.reading import Reader, as_many_as_time_allows, character_error_rate, lines_for
from services.compiler.search import Limit
from services.runtimes import torch_trocr
from services.runtimes.artifacts.manifest import Check, Measured
from services.runtimes.hardware import Hardware

# Lines that every try of the search reads; the outcome is read on all.
_SEARCH_LINES = 128
_SPEED_LINES = 8
_CPU = Hardware("cpu", "cpu", "CPU", 0, 1)


class TextJudge:
    """See Judge. In float32 the texts have to be torch's own; else the character error rate may rise by the budget."""

    def __init__(self, exported: Exported, checkpoint: Path, request: CompileRequest) -> None:
        """Raises LinesError."""
        self._checkpoint = checkpoint
        self._reader = Reader(exported, checkpoint)
        self._calibration, self._lines = lines_for(request.calibration_folder, checkpoint)
        precisions = {request.component_precisions.get(g.component, request.precision) for g in exported.graphs}
        self._exact = precisions == {"float32"}
        self.limit = (
            Limit("texts that differ from torch's", 0, False)
            if self._exact
            else Limit("rise of the character error rate", request.budget.character_error_rate, False)
        )
        self._texts: list[str] = []
        self._last: list[str] = []

    def watch(self, sessions: Sessions) -> None:
        """See Judge."""
        self._reader.read(self._reader.networks(sessions), self._calibration)

    def reference(self, sessions: Sessions, say: Callable[[str], None]) -> None:
        """See Judge. Texts that have to be equal are torch's own, as the service runs it, not the sessions'."""
        networks = self._torch() if self._exact else self._reader.networks(sessions)
        wanted = len(self._lines)
        self._lines, self._texts = as_many_as_time_allows(self._reader, networks, self._lines)
        if len(self._lines) < wanted:
            say(f"reading takes long here: {len(self._lines)} of {wanted} lines are judged by")

    def value(self, sessions: Sessions, *, thorough: bool) -> float:
        """See Judge."""
        chosen = list(zip(self._lines, self._texts, strict=True))
        if not thorough and len(chosen) > _SEARCH_LINES:
            chosen = [chosen[number * len(chosen) // _SEARCH_LINES] for number in range(_SEARCH_LINES)]
        lines, right = [line for line, _ in chosen], [text for _, text in chosen]
        texts = self._reader.read(self._reader.networks(sessions), lines)
        if thorough:
            self._last = texts
        if self._exact:
            return sum(text != expected for text, expected in zip(texts, right, strict=True))
        return character_error_rate(texts, lines) - character_error_rate(right, lines)

    def checks(self) -> tuple[list[Check], list[Measured]]:
        """See Judge."""
        texts = self._last
        before, after = character_error_rate(self._texts, self._lines), character_error_rate(texts, self._lines)
        equal = sum(text == right for text, right in zip(texts, self._texts, strict=True))
        value = len(texts) - equal if self._exact else after - before
        return [Check(self.limit.name, value, self.limit.limit, False, f"of {len(texts)} lines")], [
            Measured("character error rate", after),
            Measured("character error rate in float32", before),
            Measured("texts equal to float32", equal / len(texts)),
            Measured("lines read", len(texts)),
        ]

    def speed_pair(self, sessions: Sessions) -> tuple[Callable[[], object], Callable[[], object]]:
        """See Judge."""
        lines: list[Line] = evenly(self._lines, _SPEED_LINES)
        served, built = self._torch(), self._reader.networks(sessions)
        return (lambda: self._reader.read(served, lines)), (lambda: self._reader.read(built, lines))

    def _torch(self) -> torch_trocr.TrocrModel:
        model = torch_trocr.load(self._checkpoint, device="cpu", precision="float32", hardware=_CPU)
        return torch_trocr.TrocrModel(model)
