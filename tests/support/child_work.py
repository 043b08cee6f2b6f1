"""`python -m tests.support.child_work`: work for tests of child processes; it does what its request says."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from services.kit import child_side, faults


class Todo(msgspec.Struct):
    """steps: how many are told. then: what comes after them. wait_for: a path that each step waits for, if named."""

    steps: int = 1
    then: str = "answer"
    wait_for: str = ""
    result: str = ""  # a file that it leaves behind at its end, and whose writing twice is an error


class Step(msgspec.Struct):
    """pids: of the work and of those below it. folder: its temporary one."""

    number: int
    pids: list[int]
    folder: str


class Answer(msgspec.Struct):
    steps: int


def work(todo: Todo, folder: Path, say: Callable[[msgspec.Struct], None]) -> Answer:
    print("a library's greeting")
    if todo.result and Path(todo.result).exists():
        return Answer(todo.steps)  # of a run that ended before anybody took its answer
    tempfile.NamedTemporaryFile(delete=False).write(b"left behind")  # noqa: SIM115
    pids = [os.getpid()]
    if todo.then == "sleep":
        # One in the process group, and one that left it.
        for session in (False, True):
            sleeping = subprocess.Popen(
                [sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=session
            )
            pids.append(sleeping.pid)
    for number in range(1, todo.steps + 1):
        while todo.wait_for and not Path(todo.wait_for).exists():
            time.sleep(0.002)  # busy, like work that takes its time
        say(Step(number, pids, str(folder)))
    match todo.then:
        case "sleep":
            time.sleep(3600)
        case "fault":
            raise faults.failed_precondition("NO_SUCH_DEVICE", "there is no cuda here")
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "be killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "defect":
            raise ZeroDivisionError("secret words")
        case "memory":
            taken = []
            while True:
                taken.append(os.urandom(16 << 20))
        case "no memory":
            raise MemoryError("cannot allocate 8 GiB")
        case "full disk":
            with open("/dev/full", "wb", buffering=0) as full:
                full.write(b"x")
    if todo.result:
        open(todo.result, "x").close()
    return Answer(todo.steps)


if __name__ == "__main__":
    child_side.serve(Todo, work)
