"""Judges what a request says about its scheduler, without diffusers: which options apply, and their ranges."""

import math
from collections.abc import Iterator, Sequence

from services.diffusion.domain import Sampling
from services.diffusion.scheduler_table import TABLE, SchedulerEntry
from services.kit.faults import FieldViolation

# Above what any model starts from (4096 for zero terminal SNR in diffusers); far beyond it float32 overflows.
SIGMA_MOST = 10_000.0


def steps_by_hand(sampling: Sampling) -> int | None:
    """How many steps the timesteps or sigmas given by hand make; None if none are given. A last sigma of 0 is the end
    of the last step, and no step itself.
    """
    if sampling.timesteps:
        return len(sampling.timesteps)
    if sampling.sigmas:
        return sum(sigma != 0 for sigma in sampling.sigmas)
    return None


def check(
    entry: SchedulerEntry | None,
    sampling: Sampling,
    step_limit: int,
    train_step_count: int = 1000,
    *,
    step_count: int | None = None,
) -> list[FieldViolation]:
    """Everything in `sampling` that the scheduler cannot do, each with what would be accepted.

    entry: None for a model's own scheduler that the table lacks; it takes no options. step_count: what the request
    itself says, None if nothing: steps given by hand replace it, so another number beside them is a contradiction.
    """
    violations = [
        *_unknown_options(entry, sampling),
        *_eta(sampling),
        *_prediction(entry, sampling),
        *_conflicts(entry, sampling),
        *_timesteps(sampling, train_step_count),
        *_sigmas(entry, sampling),
    ]
    count = steps_by_hand(sampling)
    if count is not None:
        field = "timesteps" if sampling.timesteps else "sigmas"
        if count > step_limit:
            violations.append(FieldViolation(f"sampling.{field}", f"{count} steps; accepted: 1 to {step_limit}"))
        if step_count is not None and step_count != count:
            violations.append(
                FieldViolation(
                    "step_count",
                    f"{step_count} contradicts the {count} steps of sampling.{field}; leave it unset or {count}",
                )
            )
    return violations


def _unknown_options(entry: SchedulerEntry | None, sampling: Sampling) -> Iterator[FieldViolation]:
    taken = entry.sampling_options if entry else ()
    for option in ("sigma_schedule", "timestep_spacing", "prediction_type", "eta", "timesteps", "sigmas"):
        if getattr(sampling, option) in (None, ()) or option in taken:
            continue
        name = entry.name if entry else "the model's own scheduler"
        family = entry.family if entry else "noise"
        takers = [e.name for e in TABLE.values() if option in e.sampling_options and e.family == family]
        advice = f"schedulers that do: {', '.join(takers)}" if takers else "no scheduler for this kind of model does"
        yield FieldViolation(f"sampling.{option}", f"{name} does not take it; {advice}")


def _eta(sampling: Sampling) -> Iterator[FieldViolation]:
    if sampling.eta is not None and not 0 <= sampling.eta <= 1:  # NaN too is refused here
        yield FieldViolation("sampling.eta", f"{sampling.eta:g} is out of range; accepted: 0 to 1")


def _prediction(entry: SchedulerEntry | None, sampling: Sampling) -> Iterator[FieldViolation]:
    known = entry.prediction_types if entry else ()
    if sampling.prediction_type and known and sampling.prediction_type not in known:
        assert entry is not None
        able = [e.name for e in TABLE.values() if sampling.prediction_type in e.prediction_types]
        yield FieldViolation(
            "sampling.prediction_type",
            f"{entry.name} cannot do {sampling.prediction_type}; accepted: {', '.join(known)}, or another scheduler: "
            f"{', '.join(able)}",
        )


def _conflicts(entry: SchedulerEntry | None, sampling: Sampling) -> Iterator[FieldViolation]:
    if sampling.timesteps and sampling.sigmas:
        yield FieldViolation("sampling.sigmas", "timesteps are given too; accepted: one of the two")
    by_hand = "timesteps" if sampling.timesteps else "sigmas" if sampling.sigmas else ""
    for option in ("sigma_schedule", "timestep_spacing"):
        if by_hand and getattr(sampling, option):
            yield FieldViolation(
                f"sampling.{option}", f"the steps are given by hand in sampling.{by_hand}; accepted: one of the two"
            )
    if (
        entry
        and not by_hand
        and sampling.sigma_schedule
        and sampling.timestep_spacing
        and "timestep_spacing" in entry.sampling_options
        and not entry.spaces_sigmas
    ):
        yield FieldViolation(
            "sampling.timestep_spacing",
            f"with sampling.sigma_schedule it has no effect on {entry.name}; accepted: one of the two",
        )


def _timesteps(sampling: Sampling, train_step_count: int) -> Iterator[FieldViolation]:
    for index, step in enumerate(sampling.timesteps):
        if not 0 <= step < train_step_count:
            yield FieldViolation(
                f"sampling.timesteps[{index}]", f"{step} is out of range; accepted: 0 to {train_step_count - 1}"
            )
            return
    yield from _must_fall("timesteps", sampling.timesteps)


def _sigmas(entry: SchedulerEntry | None, sampling: Sampling) -> Iterator[FieldViolation]:
    most = 1.0 if entry and entry.flow else SIGMA_MOST
    for index, sigma in enumerate(sampling.sigmas):
        if not (math.isfinite(sigma) and 0 <= sigma <= most):
            yield FieldViolation(f"sampling.sigmas[{index}]", f"{sigma:g} is out of range; accepted: 0 to {most:g}")
            return
    if sampling.sigmas and sampling.sigmas[0] == 0:
        yield FieldViolation("sampling.sigmas[0]", "0 is the end of the last step; accepted: more than 0")
        return
    yield from _must_fall("sigmas", sampling.sigmas)


def _must_fall(field: str, values: Sequence[float]) -> Iterator[FieldViolation]:
    for index in range(1, len(values)):
        if values[index] >= values[index - 1]:
            yield FieldViolation(
                f"sampling.{field}[{index}]",
                f"{values[index]:g} does not fall below {values[index - 1]:g} before it; accepted: falling values",
            )
            return
