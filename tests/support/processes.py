"""Processes that a test did not start itself: whether they live, and waiting for their end."""

import contextlib
import os
import select

import psutil


def alive(pids: list[int]) -> list[int]:
    """Those that run. One that is dead, but whose new parent has not looked yet, does not."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found


def wait_end(pid: int) -> None:
    """Return when the process has ended."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        select.select([descriptor], [], [])
        os.close(descriptor)
