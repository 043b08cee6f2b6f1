"""What the engine process notes of the jobs whose calls are traced: the phases that each goes through, and its steps.

A job is in one phase at a time. The front makes spans of them (`services.kit.tracing`); no tracing library is here, and
no transport. For jobs that are not followed everything here is one look into a dictionary. One thread, the engine's.
"""

import time

import msgspec

Values = dict[str, str | int | float]

# Of each phase; a text may have more tokens than anybody looks at.
_STEPS_MOST = 128


class Step(msgspec.Struct, frozen=True, array_like=True):
    """Something that happened in a phase. at_ns: Unix time."""

    at_ns: int
    attributes: Values


class Phase(msgspec.Struct, array_like=True):
    """A part of a job's time in the engine. Unix times; `ended_ns` is 0 while it goes on."""

    name: str
    began_ns: int
    ended_ns: int
    attributes: Values
    steps: list[Step]


_followed: dict[str, list[Phase]] = {}


def follow(job: str) -> None:
    """Note what becomes of the job, which begins by waiting."""
    _followed[job] = [Phase("wait", time.time_ns(), 0, {}, [])]


def followed(job: str) -> bool:
    """Whether somebody wants to know."""
    return job in _followed


def enter(job: str, name: str, **attributes: str | int | float) -> None:
    """The job's next phase begins, unless it is in that one already."""
    phases = _followed.get(job)
    if phases is None or phases[-1].name == name:
        return
    now = time.time_ns()
    phases[-1].ended_ns = now
    phases.append(Phase(name, now, 0, attributes, []))


def accepted(job: str) -> None:
    """Compute on the job began; an engine that has said more than that is not contradicted."""
    phases = _followed.get(job)
    if phases is not None and len(phases) == 1:
        enter(job, "compute")


def step(job: str, **attributes: str | int | float) -> None:
    """A step of the job's phase is done. The phase counts all of them and keeps the first 128."""
    phases = _followed.get(job)
    if phases is None:
        return
    phase = phases[-1]
    phase.attributes["steps"] = int(phase.attributes.get("steps", 0)) + 1
    if len(phase.steps) < _STEPS_MOST:
        phase.steps.append(Step(time.time_ns(), attributes))


def take(job: str) -> tuple[Phase, ...]:
    """The job ended: what it went through. Empty if it is not followed."""
    phases = _followed.pop(job, None)
    if phases is None:
        return ()
    phases[-1].ended_ns = time.time_ns()
    return tuple(phases)
