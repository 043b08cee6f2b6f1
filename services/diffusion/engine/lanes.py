"""Lanes: pictures being painted side by side, in turns, on one thread.

A diffusers pipeline is a function that runs from prompt to picture in one go. Here each picture's call of it runs in a
greenlet of its own; whenever the pipeline calls its denoiser, the greenlet hands the call out and sleeps. The engine
runs the denoiser and resumes the greenlet with the result. So the pipelines' own code is used as it is, yet callers
interleave, join and leave between any two steps. Nothing runs in parallel: it is one thread throughout.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from greenlet import getcurrent, greenlet
from torch import nn


class LaneStopped(BaseException):
    """Thrown into a lane to end it. Not an Exception: no pipeline may catch it as a failure to recover from."""


# Runs a denoiser call in a picture's own way: what it is called with, and what stands around it.
Around = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def _as_it_is(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return forward(*args, **kwargs)


class Evaluation:
    """A denoiser call that waits to be run."""

    def __init__(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], around: Around
    ) -> None:
        self._forward = forward
        self._args = args
        self._kwargs = kwargs
        self._around = around

    def run(self) -> Any:
        """Run it, on the calling greenlet; answers what the denoiser answers."""
        return self._around(self._forward, self._args, self._kwargs)


class LaneGreenlet(greenlet):  # type: ignore[misc]
    """Marks a greenlet as a lane, so that denoiser and VAE know whom they serve."""

    around: Around
    decoding: Any


def open_gate(denoiser: nn.Module) -> None:
    """Make the module's calls, when they come from a lane, wait for the engine. Other callers notice nothing."""
    forward = denoiser.forward

    @functools.wraps(forward)
    def gated(*args: Any, **kwargs: Any) -> Any:
        lane = getcurrent()
        if not isinstance(lane, LaneGreenlet):
            return forward(*args, **kwargs)
        return lane.parent.switch(Evaluation(forward, args, kwargs, lane.around))

    denoiser.forward = gated


def current_decoding() -> Any:
    """The `Decoding` of the lane that this is called in; None outside of lanes."""
    lane = getcurrent()
    return lane.decoding if isinstance(lane, LaneGreenlet) else None


def pause() -> None:
    """Called inside a lane: let the engine have a turn before the lane goes on. Elsewhere does nothing."""
    lane = getcurrent()
    if isinstance(lane, LaneGreenlet):
        lane.parent.switch(None)


class Lane:
    """One picture's way through a pipeline.

    run: paints the picture; it is called inside the lane. around: what stands around its denoiser's calls, on the
    engine's main greenlet. decoding: how its latents are decoded (engine/decoding.py). Must be made and advanced on the
    engine's main greenlet.
    """

    def __init__(self, run: Callable[[], Any], *, around: Around = _as_it_is, decoding: Any = None) -> None:
        self._greenlet = LaneGreenlet(run)
        self._greenlet.around = around
        self._greenlet.decoding = decoding
        self._waiting: Evaluation | None = None
        self.turns = 0
        self.evaluations = 0
        self.finished = False
        self.result: Any = None

    def advance(self) -> None:
        """One turn: run the denoiser call that waits, if any, and resume the pipeline until it wants the next turn.

        Whatever the pipeline raises comes out here, and ends the lane.
        """
        self.turns += 1
        if self._waiting is None:
            handed_out = self._greenlet.switch()
        else:
            evaluation, self._waiting = self._waiting, None
            self.evaluations += 1
            handed_out = self._greenlet.switch(evaluation.run())
        if self._greenlet.dead:
            self.finished, self.result = True, handed_out
        else:
            self._waiting = handed_out

    def stop(self) -> None:
        """End the lane where it stands, running its `finally` blocks. Without effect on one that has ended."""
        self._waiting = None
        if not self._greenlet.dead:
            with contextlib.suppress(LaneStopped):
                self._greenlet.throw(LaneStopped())
