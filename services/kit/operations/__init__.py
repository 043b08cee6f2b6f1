"""Work that outlives connections and restarts.

A service says what it can do (`Kind`), hands over requests (`Operations.submit`) and answers with names; callers follow
them with google.longrunning.Operations and inkwell.operations.v1.OperationsWatchService (`register`).

    settings.py    the knobs, to be inherited by the service's own Settings
    kinds.py       the vocabulary: kinds of work, events, outcomes, and an operation as its callers see it
    log.py         what was asked for and said, in SQLite or Postgres: the truth that callers are told
    workflows.py   DBOS: the queue, and that a lost process's work is run again
    service.py     Operations itself
    servicer.py    the gRPC surface
"""

from services.kit.operations.kinds import (
    Cancelled,
    Done,
    Event,
    Failed,
    Kind,
    Operation,
    Progress,
    Queued,
    Running,
    Say,
    Started,
    State,
    Succeeded,
)
from services.kit.operations.service import Operations
from services.kit.operations.servicer import register
from services.kit.operations.settings import OperationsSettings

__all__ = [
    "Cancelled",
    "Done",
    "Event",
    "Failed",
    "Kind",
    "Operation",
    "Operations",
    "OperationsSettings",
    "Progress",
    "Queued",
    "Running",
    "Say",
    "Started",
    "State",
    "Succeeded",
    "register",
]
