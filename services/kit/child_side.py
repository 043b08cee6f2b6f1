"""The inside of a child process that `services.kit.child` runs: takes a request, tells how it goes, answers.

What it tells are JSON lines, one of the structs here each.
"""

import errno
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from services.kit import faults
from services.kit.child_guard import LINES
from services.kit.faults import Fault, FaultData, Kind

Request = TypeVar("Request", bound=msgspec.Struct)


class ToldProgress(msgspec.Struct, frozen=True, tag="progress"):
    """How it goes, in the work's own struct."""

    value: msgspec.Raw


class ToldResponse(msgspec.Struct, frozen=True, tag="response"):
    """What came of it. The last line."""

    value: msgspec.Raw


class ToldFault(msgspec.Struct, frozen=True, tag="fault"):
    """Why nothing came of it. The last line."""

    fault: FaultData


Line = ToldProgress | ToldResponse | ToldFault


def serve(
    request_type: type[Request],
    work: Callable[[Request, Path, Callable[[msgspec.Struct], None]], msgspec.Struct],
) -> None:
    """Do the one request that this process was started for: `work(request, folder, say) -> response`.

    folder: for temporary files, as is TMPDIR; removed when the process ends, however it does. say: tells progress, from
    any thread. `work` fails by raising Fault. Any other exception ends the process with exit code 1 and a traceback on
    standard error; but memory or a disk that is full becomes a fault that says so. After a fault the exit code is 1.
    """
    lines = os.fdopen(int(os.environ[LINES]), "wb", buffering=0)

    def tell(line: Line) -> None:
        lines.write(msgspec.json.encode(line) + b"\n")  # one write, so that threads do not mix theirs

    def say(progress: msgspec.Struct) -> None:
        tell(ToldProgress(msgspec.Raw(msgspec.json.encode(progress))))

    request = msgspec.json.decode(sys.stdin.buffer.read(), type=request_type)
    folder = Path(os.environ["TMPDIR"])
    try:
        response = work(request, folder, say)
    except Fault as fault:
        tell(ToldFault(fault.data))
    except MemoryError as error:
        traceback.print_exception(error)
        tell(ToldFault(FaultData(Kind.TOO_LARGE, "OUT_OF_MEMORY", f"this machine's memory is not enough: {error}")))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        traceback.print_exception(error)
        tell(ToldFault(_disk_full(error, folder).data))
    else:
        tell(ToldResponse(msgspec.Raw(msgspec.json.encode(response))))
        return
    raise SystemExit(1)


def _disk_full(error: OSError, folder: Path) -> Fault:
    place = error.filename or folder
    return faults.failed_precondition(
        "DISK_FULL",
        f"there is no space left on the disk of {place}; free some, or set another folder, and send the request again",
        path=place,
    )
