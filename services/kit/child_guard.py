"""`python -m services.kit.child_guard ORDER`: runs a module in a process below it, and cleans up when that ends.

The guard does nothing but wait, so it is there whatever the work does: for the work to end, or for the far end of a
pipe to close, which the kernel does when the process that started it is gone, kill -9 included. Then it kills whatever
is left of the work, removes its folders, and ends as the work did.

Nothing but the standard library is imported: the work is forked from here.
"""

import contextlib
import ctypes
import json
import os
import resource
import runpy
import select
import shutil
import signal
import sys
from collections.abc import Iterable

# <linux/prctl.h>
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

# The work finds the number of the file here to which its lines go. Standard output is not that file: there, what
# libraries print would come in between.
LINES = "INKWELL_CHILD_LINES"

_BROKEN_OFF = 1
_TOLD_TO_END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main() -> None:
    """ORDER is JSON.

    module: to be run. life: number of the pipe's near end. folder: removed at the end. partial: folders that are
    removed too unless the module ends with exit code 0.
    """
    order = json.loads(sys.argv[1])
    guard = os.getpid()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what the work leaves behind becomes a child of the guard's
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    for number in (signal.SIGCHLD, *_TOLD_TO_END):
        signal.signal(number, lambda *_: None)
    work = os.fork()
    if work == 0:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, *_TOLD_TO_END):
            signal.signal(number, signal.SIG_DFL)
        os.setpgid(0, 0)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:
            os._exit(_BROKEN_OFF)
        for descriptor in (order["life"], wake_read, wake_write):
            os.close(descriptor)
        os.environ[LINES] = str(os.dup(1))
        os.dup2(2, 1)
        sys.argv = [order["module"]]
        runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
        return
    with contextlib.suppress(OSError):  # the work did it first, or is gone
        os.setpgid(work, work)
    # So that who reads the work's output learns that it has ended.
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    status = _wait(work, order["life"], wake_read)
    _kill_all(work)
    _remove([order["folder"]])
    if status is None or status != 0:
        _remove(order["partial"])
    _end(status)


def _wait(work: int, life: int, wake: int) -> int | None:
    """The work's wait status; None if the pipe was closed first, or the guard was told to end."""
    while True:
        ended, status = os.waitpid(work, os.WNOHANG)
        if ended == work:
            return status
        ready, _, _ = select.select([life, wake], [], [])
        if life in ready:  # nobody writes to it: it is at its end
            return None
        if set(os.read(wake, 512)).intersection(_TOLD_TO_END):  # a byte a signal
            return None


def _kill_all(work: int) -> None:
    """Kill the work's process group and every process that it has left behind, and wait for their ends."""
    while True:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(work, signal.SIGKILL)
        for child in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as listed:
            return [int(child) for child in listed.read().split()]
    except OSError:  # not Linux
        return []


def _remove(folders: Iterable[str]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _end(status: int | None) -> None:
    if status is None:
        os._exit(_BROKEN_OFF)
    if os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if os.WTERMSIG(status) != signal.SIGKILL:
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    main()
