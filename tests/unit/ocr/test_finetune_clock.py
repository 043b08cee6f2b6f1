"""When a run evaluates, saves and ends, by steps or by the clock."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from services.ocr.finetune.trainer import Clock


@dataclass
class Run:
    """Drives a clock as the library's loop does."""

    clock: Clock
    step: int = 0
    seconds: float = 0.0

    def advance(self, seconds: float = 0.0) -> Any:
        self.seconds += seconds
        control = SimpleNamespace(
            should_evaluate=False, should_save=False, should_log=False, should_training_stop=False
        )
        state = SimpleNamespace(global_step=self.step)
        arguments = SimpleNamespace(world_size=1)
        self.clock.on_step_begin(arguments, state, control)
        self.step += 1
        state.global_step = self.step
        self.clock.on_step_end(arguments, state, control)
        return control


def make(**changes: Any) -> Run:
    settings = {"steps": 20, "seconds": 0.0, "evaluations": 4, "save_seconds": 1e9, "warmup": 4, "patience": 0}
    run = Run(None)  # type: ignore[arg-type]
    run.clock = Clock(**{**settings, **changes}, now=lambda: run.seconds)
    run.clock.start()
    return run


def test_by_steps_it_evaluates_so_often_and_ends() -> None:
    run = make()
    controls = [run.advance() for _ in range(20)]
    assert [number + 1 for number, control in enumerate(controls) if control.should_evaluate] == [5, 10, 15, 20]
    assert [number + 1 for number, control in enumerate(controls) if control.should_training_stop] == [20]
    assert all(control.should_save == control.should_evaluate for control in controls)


def test_by_the_clock_it_ends_when_the_time_is_over() -> None:
    run = make(steps=1_000_000, seconds=100.0)
    controls = [run.advance(15.0) for _ in range(7)]
    assert [control.should_evaluate for control in controls] == [False, True, False, True, True, False, True]
    assert [control.should_training_stop for control in controls] == [False] * 6 + [True]
    assert run.clock.factor(run.step) < 0.02


def test_it_saves_between_evaluations() -> None:
    run = make(steps=1000, save_seconds=60.0)
    saved = [run.advance(25.0).should_save for _ in range(6)]
    assert saved == [False, False, True, False, False, True]


def test_the_rate_rises_and_falls() -> None:
    run = make(steps=100, warmup=10)
    factors = []
    for _ in range(100):
        run.advance()
        factors.append(run.clock.factor(run.step))
    peak = factors.index(max(factors))
    assert 6 <= peak <= 12
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert factors[-1] < 0.02


def test_it_stops_when_nothing_gets_better() -> None:
    run = make(patience=2)
    run.clock.progress.stale = 1
    assert not run.advance().should_training_stop
    run.clock.progress.stale = 2
    assert run.advance().should_training_stop


def test_asked_to_stop_it_saves_and_ends_with_the_step() -> None:
    run = make()
    assert not run.advance().should_save
    run.clock.stop_asked = True
    control = run.advance()
    assert control.should_save
    assert control.should_training_stop


def test_a_restart_counts_the_time_before() -> None:
    run = make(steps=1_000_000, seconds=100.0)
    run.advance(40.0)
    again = make(steps=1_000_000, seconds=100.0)
    again.clock.progress = run.clock.progress
    again.clock.start()
    again.advance(30.0)
    assert again.clock.share == 0.7
