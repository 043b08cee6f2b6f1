"""Judges: what a whole model has to be as good as, and whether one that was built is."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from services.compiler.domain import CompileRequest
from services.compiler.export.exported import Exported
from services.compiler.search import Limit
from services.runtimes.artifacts.manifest import Check, Measured
from services.runtimes.sessions.interface import Session

Sessions = Mapping[str, Session]


class Judge(Protocol):
    """Of one exported model. Sessions are by component."""

    limit: Limit  # what `value` has to be

    def watch(self, sessions: Sessions) -> None:
        """Run the model as it is used, on inputs that are not judged by: sessions that record are calibrated on it."""

    def reference(self, sessions: Sessions, say: Callable[[str], None]) -> None:
        """Note what the model does in float32; before `value`."""

    def value(self, sessions: Sessions, *, thorough: bool) -> float:
        """How good a built model is. thorough: on all that there is, else on a part."""

    def checks(self) -> tuple[list[Check], list[Measured]]:
        """What the manifest says of the model that was last judged thoroughly."""

    def speed_pair(self, sessions: Sessions) -> tuple[Callable[[], object], Callable[[], object]]:
        """One piece of work on torch in float32 as it is served, and the same on these sessions."""


def judge_of(exported: Exported, checkpoint: Path, request: CompileRequest) -> Judge:
    """The judge of a model of this kind. Raises LinesError, PromptsError for a calibration folder that is no good."""
    if exported.kind == "trocr":
        from services.compiler.quality.text_judge import TextJudge

        return TextJudge(exported, checkpoint, request)
    from services.compiler.quality.picture_judge import OutputJudge, PictureJudge

    if {graph.component for graph in exported.graphs} == {"controlnet"}:
        return OutputJudge(exported)
    return PictureJudge(exported, checkpoint, request)
