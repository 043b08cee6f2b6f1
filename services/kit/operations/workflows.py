"""DBOS (https://docs.dbos.dev): the queue of operations, and that what a lost process was running is run again.

Each operation is one DBOS workflow under the operation's id. DBOS decides who runs it and when; whether it still has to
be run, and what came of it, stands in the log. Blocking, and only to be called where no event loop runs: DBOS would
take that loop for its own.
"""

import fcntl
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO

import sqlalchemy as sa
from dbos import DBOS, DBOSClient, SetEnqueueOptions, SetWorkflowID, WorkflowSerializationFormat

# DBOS resumes workflows only under the version of the code that began them. Ours are the same in every version: the
# log knows what they are to do.
_VERSION = "1"
_WORKFLOW = "operation"
# How often the queue is looked at: what an operation waits at most when nothing else does.
_POLL_S = 0.25


class _LeftError(BaseException):
    """Ends a workflow's thread and leaves the workflow as it is. Of an Exception DBOS would make its outcome."""


class Workflows:
    """One process's share of the work. There is one at a time in a process, as DBOS has it.

    run: does the operation with this id; False if how that ended is for somebody else to say.
    """

    def __init__(
        self,
        service: str,
        url: sa.URL,
        *,
        schema: str | None,
        process: str,
        concurrency: int,
        run: Callable[[str], bool],
    ) -> None:
        self._queue = service
        self._url = url
        self._schema = schema
        self._service = service
        self._process = process
        self._concurrency = concurrency
        self._run = run

    def launch(self) -> None:
        """Connect, make DBOS's tables, and begin to take operations from the queue."""
        # DBOS would write plain lines to standard error; the service's own handler writes JSON.
        logger = logging.getLogger("dbos")
        logger.addHandler(logging.NullHandler())
        url = self._url.render_as_string(hide_password=False)
        schema = self._schema or "dbos"  # SQLite has no schemas
        name = f"inkwell-{self._service}"
        DBOS.migrate(url, schema=schema)
        # Before the launch: DBOS looks for new queues only now and then.
        client = DBOSClient(
            system_database_url=url, dbos_system_schema=schema, application_name=name, retry_connection_errors=False
        )
        try:
            client.register_queue(
                self._queue, worker_concurrency=self._concurrency, polling_interval_sec=_POLL_S, application_name=name
            )
        finally:
            client.destroy()
        DBOS(
            config={
                "name": name,
                "system_database_url": url,
                "dbos_system_schema": schema,
                "application_version": _VERSION,
                "executor_id": self._process,
                "log_level": "WARNING",
                "sys_db_pool_size": 5,
                "use_listen_notify": False,
                # Nothing here uses DBOS's notifications, and on closing it waits for the next look for some.
                "notification_listener_polling_interval_sec": 0.2,
            }
        )

        @DBOS.workflow(
            name=_WORKFLOW, max_recovery_attempts=None, serialization_type=WorkflowSerializationFormat.PORTABLE
        )
        def operation(operation_id: str) -> None:
            if not self._run(operation_id):
                raise _LeftError

        self._operation = operation
        DBOS.launch()

    def close(self) -> None:
        """Take nothing more; what runs must have ended."""
        DBOS.destroy(destroy_registry=True)

    def enqueue(self, operation_id: str, priority: int) -> None:
        """Queue an operation; nothing if it has been queued before. priority: 1 is served first."""
        with SetWorkflowID(operation_id), SetEnqueueOptions(priority=priority):
            DBOS.enqueue_workflow(self._queue, self._operation, operation_id)

    def cancel(self, operation_id: str) -> None:
        """Take an operation out of the queue, or let what its run answers count for nothing."""
        DBOS.cancel_workflows([operation_id])

    def delete(self, operation_ids: Sequence[str]) -> None:
        """Forget workflows that have ended."""
        DBOS.delete_workflows(list(operation_ids))

    def take_over(self, process: str) -> list[str]:
        """Queue again what a lost process was running; answers the ids."""
        found = DBOS.list_workflows(status="PENDING", executor_id=process, load_input=False, load_output=False)
        ids = [workflow.workflow_id for workflow in found]
        if ids:
            DBOS.resume_workflows(ids, queue_name=self._queue)
        return ids

    def queue_again(self, waiting: Iterable[tuple[str, int]]) -> list[str]:
        """Of operations that wait (id, priority), queue those that no workflow will ever run; answers their ids.

        That is how one looks whose process was lost between writing it down and queueing it.
        """
        priorities = dict(waiting)
        if not priorities:
            return []
        found = DBOS.list_workflows(workflow_ids=list(priorities), load_input=False, load_output=False)
        ended = [w.workflow_id for w in found if w.status not in ("ENQUEUED", "DELAYED", "PENDING")]
        if ended:
            DBOS.delete_workflows(ended)
        lost = [*(priorities.keys() - {w.workflow_id for w in found}), *ended]
        for operation_id in lost:
            self.enqueue(operation_id, priorities[operation_id])
        return lost


class DatabaseInUseError(OSError):
    """Another process works on the same SQLite file."""


def lock(path: Path) -> IO[str]:
    """Reserve an SQLite file, whose folder is made, for this process while the answer is open.

    Raises DatabaseInUseError. Two processes on one file could not tell whether the other still lives, and would run
    each other's operations. The kernel gives the lock back when the process ends, however it does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held = open(path.with_name(f"{path.name}.lock"), "a+")  # noqa: SIM115 - open as long as the service
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.seek(0)
        owner = held.read().strip() or "unknown"
        held.close()
        raise DatabaseInUseError(
            f"{path} is in use by process {owner}: end that one, or set another file, or a postgresql:// address, which"
            " several processes may share, as operations_database"
        ) from None
    held.truncate(0)
    held.write(str(os.getpid()))
    held.flush()
    return held
