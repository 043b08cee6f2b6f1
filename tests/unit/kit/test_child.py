"""Heavy work in a process of its own: within its limits, and nothing of it stays."""

import asyncio
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from services.kit.child import Limits, run_child
from services.kit.faults import Fault, Kind
from tests.support.child_work import Answer, Step, Todo
from tests.support.processes import alive, wait_end

MIB = 1 << 20
LIMITS = Limits(memory_bytes=1 << 30, time_s=60, remedy="raise MEMORY_BYTES")


class Heard(list[Step]):
    """The steps told, and an event of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = asyncio.Event()

    async def __call__(self, step: Step) -> None:
        self.append(step)
        self.first.set()


async def run(todo: Todo, heard: Heard, limits: Limits = LIMITS, **options: Any) -> Answer:
    return await run_child(
        "tests.support.child_work", todo, progress=Step, response=Answer, on_progress=heard, limits=limits, **options
    )


def assert_gone(step: Step) -> None:
    assert not Path(step.folder).exists()
    assert not alive(step.pids)


async def test_progress_comes_in_order_and_then_the_answer() -> None:
    heard = Heard()
    assert await run(Todo(steps=3), heard) == Answer(3)
    assert [step.number for step in heard] == [1, 2, 3]
    assert_gone(heard[0])


@pytest.mark.parametrize(
    ("then", "kind", "reason", "words"),
    [
        ("fault", Kind.FAILED_PRECONDITION, "NO_SUCH_DEVICE", "there is no cuda here"),
        ("crash", Kind.INTERNAL, "PROCESS_KILLED", "SIGSEGV"),
        ("be killed", Kind.INTERNAL, "PROCESS_KILLED", "ran out of memory, or somebody killed it; raise MEMORY_BYTES"),
        ("defect", Kind.INTERNAL, "PROCESS_FAILED", "exit code 1"),
        ("no memory", Kind.TOO_LARGE, "OUT_OF_MEMORY", "cannot allocate 8 GiB"),
        ("full disk", Kind.FAILED_PRECONDITION, "DISK_FULL", "no space left"),
    ],
)
async def test_what_goes_wrong_is_a_precise_fault(
    then: str, kind: Kind, reason: str, words: str, tmp_path: Path
) -> None:
    heard = Heard()
    partial = tmp_path / "partial"
    partial.mkdir()
    with pytest.raises(Fault) as failed:
        await run(Todo(then=then), heard, partial=[partial])
    assert (failed.value.data.kind, failed.value.data.reason) == (kind, reason)
    assert words in failed.value.data.message
    assert "secret words" not in failed.value.data.message
    assert_gone(heard[0])
    assert not partial.exists()


async def test_folders_of_a_run_that_answered_stay(tmp_path: Path) -> None:
    (tmp_path / "partial").mkdir()
    await run(Todo(), Heard(), partial=[tmp_path / "partial"])
    assert (tmp_path / "partial").exists()


async def test_memory_over_the_limit_ends_it_and_says_what_would_help() -> None:
    heard = Heard()
    with pytest.raises(Fault) as failed:
        await run(Todo(then="memory"), heard, Limits(200 * MIB, 60, "raise MEMORY_BYTES"))
    assert (failed.value.data.kind, failed.value.data.reason) == (Kind.TOO_LARGE, "MEMORY_LIMIT")
    assert "limit of 200 MiB; raise MEMORY_BYTES" in failed.value.data.message
    assert_gone(heard[0])


async def test_time_over_the_limit_ends_it() -> None:
    heard = Heard()
    with pytest.raises(Fault) as failed:
        await run(Todo(steps=0, then="sleep"), heard, Limits(1 << 30, 0.5, "raise TIME_S"))
    assert (failed.value.data.kind, failed.value.data.reason) == (Kind.DEADLINE, "TIME_LIMIT")
    assert "limit of 0.5 s; raise TIME_S" in failed.value.data.message


@pytest.mark.parametrize("times", [1, 3])
async def test_cancelling_ends_all_its_processes_and_removes_its_files(times: int, tmp_path: Path) -> None:
    heard = Heard()
    partial = tmp_path / "partial"
    partial.mkdir()
    running = asyncio.create_task(run(Todo(then="sleep"), heard, partial=[partial]))
    await heard.first.wait()
    assert alive(heard[0].pids) == heard[0].pids
    assert len(heard[0].pids) == 3
    for _ in range(times):
        running.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await running
    assert_gone(heard[0])
    assert not partial.exists()


async def test_a_listener_that_fails_ends_it() -> None:
    heard = Heard()

    async def fail(step: Step) -> None:
        heard.append(step)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await run_child(
            "tests.support.child_work",
            Todo(then="sleep"),
            progress=Step,
            response=Answer,
            on_progress=fail,
            limits=LIMITS,
        )
    assert_gone(heard[0])


PARENT = """
import asyncio, sys
from services.kit.child import Limits, run_child
from tests.support.child_work import Answer, Step, Todo
async def tell(step):
    print(*step.pids, step.folder, flush=True)
asyncio.run(run_child("tests.support.child_work", Todo(then="sleep"), progress=Step, response=Answer,
                      on_progress=tell, limits=Limits(1 << 30, 60, "")))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_when_the_parent_is_killed_nothing_stays(number: signal.Signals) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    *pids, folder = parent.stdout.readline().split()
    guards = [each for each in psutil.Process(parent.pid).children() if "child_guard" in " ".join(each.cmdline())]
    assert guards
    parent.send_signal(number)
    parent.wait()
    parent.stdout.close()
    for guard in guards:
        wait_end(guard.pid)
    assert_gone(Step(1, [int(pid) for pid in pids], folder))


def test_when_the_guard_is_told_to_end_nothing_stays() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    *pids, folder = parent.stdout.readline().split()
    for guard in psutil.Process(parent.pid).children():
        guard.terminate()
    _, errors = parent.communicate()
    assert "PROCESS_FAILED" in errors
    assert_gone(Step(1, [int(pid) for pid in pids], folder))
