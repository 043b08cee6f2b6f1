"""Which artifact a model is run from: the one that was asked for, or the fastest that is right for it here."""

import logging
from typing import Literal, Protocol

from services.runtimes.artifacts.built_on import Machine, machine, refusal
from services.runtimes.artifacts.errors import Reason, StoreError
from services.runtimes.artifacts.manifest import SPEED_RATIO, ArtifactPrecision, RuntimeName
from services.runtimes.artifacts.store import TORCH, Stored
from services.runtimes.hardware import Hardware

log = logging.getLogger(__name__)


class ChoiceError(Exception):
    """What was asked for cannot be run; the message says why and what to do."""


class Artifacts(Protocol):
    """What of a Store decides."""

    def find(self, *, source_digest: str) -> list[Stored]:
        """See Store."""

    def get(self, id_or_prefix: str) -> Stored:
        """See Store."""

    def used(self, model: str) -> str | None:
        """See Store."""


def choose(
    store: Artifacts,
    source_digest: str,
    *,
    model: str,
    hardware: Hardware,
    runtime: Literal["auto"] | RuntimeName = "auto",
    precision: Literal["auto"] | ArtifactPrecision = "auto",
    artifact: str = "",
    here: Machine | None = None,
) -> Stored | None:
    """The artifact to run a checkpoint from; None to run it on torch.

    artifact: an id that a call asked for, which overrides the settings `runtime` and `precision` ("auto": any). Next
    comes what `inkwell use` chose for the model, if it is of this runtime and meant for this hardware. Else, of this
    very checkpoint's artifacts that this machine can run, the fastest by what was measured; for runtime "auto" one has
    to be faster than torch on the hardware it was measured on, and to need no Triton server. here: this machine; None
    has it looked at.

    Raises ChoiceError when there is none of an asked runtime, or what was asked for cannot run here; StoreError.
    """
    if artifact:
        return _fitting(store.get(artifact), source_digest, model, here or machine(hardware))
    if runtime == "torch":
        return None
    here = here or machine(hardware)
    used = store.used(model)
    if used == TORCH and runtime == "auto":
        return None
    if used is not None and used != TORCH and (chosen := _used(store, used, model, runtime, here)):
        if precision not in ("auto", chosen.manifest.precision):
            raise ChoiceError(
                f"model {model}: artifact {chosen.id[:12]}, which `inkwell use` chose, has precision"
                f" {chosen.manifest.precision}, and the setting asks for {precision}; choose another, or set precision"
                " to auto"
            )
        return _fitting(chosen, source_digest, model, here)
    of_checkpoint = store.find(source_digest=source_digest)
    of_runtime = [stored for stored in of_checkpoint if runtime in ("auto", stored.manifest.runtime)]
    wanted = [stored for stored in of_runtime if precision in ("auto", stored.manifest.precision)]
    refusals = {stored.id: refusal(stored.manifest, here) for stored in wanted}
    able = [stored for stored in wanted if not refusals[stored.id]]
    if runtime == "auto":
        # Where a Triton server is, and whether it serves this artifact, nobody but who runs it knows.
        local = [stored for stored in able if stored.manifest.runtime != "triton"]
        faster = [stored for stored in local if _trusted_ratio(stored, here) > 1]
        return max(faster, key=lambda stored: _trusted_ratio(stored, here), default=None)
    if able:
        return max(able, key=lambda stored: (_trusted_ratio(stored, here), stored.manifest.figure(SPEED_RATIO) or 0))
    raise ChoiceError(_nothing_to_run(model, runtime, precision, of_runtime, refusals))


def _used(store: Artifacts, used: str, model: str, runtime: str, here: Machine) -> Stored | None:
    """What `use` chose; None when it is for another runtime or other hardware: machines that share a store differ."""
    try:
        chosen = store.get(used)
    except StoreError as error:
        if error.reason is not Reason.NOT_FOUND:
            raise
        raise ChoiceError(
            f"model {model}: artifact {used[:12]}, which `inkwell use` chose, is no longer there; choose another, or"
            " compile the model again"
        ) from error
    needed = chosen.manifest.requires.hardware
    if needed and needed != here.hardware.label:
        log.info("model %s: what `use` chose is for %s, not %s", model, needed, here.hardware.label)
        return None
    if runtime not in ("auto", chosen.manifest.runtime):
        log.info("model %s: what `use` chose runs on %s, not %s", model, chosen.manifest.runtime, runtime)
        return None
    return chosen


def _fitting(stored: Stored, source_digest: str, model: str, here: Machine) -> Stored:
    what = f"model {model}: artifact {stored.id[:12]}"
    if stored.manifest.source_digest != source_digest:
        raise ChoiceError(
            f"{what} was compiled from another checkpoint ({stored.manifest.source}) than the one that is served, or"
            f" from an earlier state of it; compile it again: inkwell compile {model} --to {stored.manifest.target}"
        )
    if why := refusal(stored.manifest, here):
        raise ChoiceError(f"{what} cannot run here: {why}")
    return stored


def _trusted_ratio(stored: Stored, here: Machine) -> float:
    """How many times as fast as torch it was, on hardware that can no more than this; 0 when nothing says so."""
    measured_on = stored.manifest.built_on
    if measured_on.hardware != here.hardware.label:
        return 0.0
    # What is fast with AVX-512's 16-bit products is slow where they are emulated.
    if here.hardware.label == "cpu" and not set(measured_on.features) <= set(here.features):
        return 0.0
    return stored.manifest.figure(SPEED_RATIO) or 0.0


def _nothing_to_run(
    model: str, runtime: str, precision: str, of_runtime: list[Stored], refusals: dict[str, str]
) -> str:
    target = {"onnxruntime": "onnx"}.get(runtime, runtime)
    compile_it = f"inkwell compile {model} --to {target}"
    if precision != "auto":
        compile_it += f" --precision {precision}"
    if not of_runtime:
        return (
            f"model {model}: there is no artifact of this checkpoint for {runtime}; make one: {compile_it}, or set"
            " runtime to auto or torch"
        )
    if not refusals:
        there = ", ".join(sorted({stored.manifest.precision for stored in of_runtime}))
        return (
            f"model {model}: the artifacts of this checkpoint for {runtime} have precision {there}, not {precision};"
            f" make one: {compile_it}, or set precision to auto"
        )
    why = "; ".join(f"artifact {one[:12]}: {reason}" for one, reason in refusals.items())
    return f"model {model}: no artifact of this checkpoint for {runtime} can run here: {why}"
