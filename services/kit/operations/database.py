"""Calling the database, which blocks and may be away for a while, from an event loop."""

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import structlog
from sqlalchemy.exc import InterfaceError, OperationalError, TimeoutError

from services.kit import faults

log = structlog.get_logger(__name__)

Parameters = ParamSpec("Parameters")
Value = TypeVar("Value")

# What a database says that is restarting, unreachable, locked or full, as far as SQLAlchemy tells it from mistakes.
_AWAY = (OperationalError, InterfaceError, TimeoutError)
# A caller waits this long for it; runs wait on.
_PATIENCE_S = 5.0
_RETRY_S = 0.2


class LeavingError(Exception):
    """The database is away and this process is about to end: what was to be written is for the next one to do."""


class Caller:
    """Threads of its own, not the loop's, whose number is bounded: what runs must always get through."""

    def __init__(self) -> None:
        self.threads = ThreadPoolExecutor(4, thread_name_prefix="operations")
        self.leaving = False

    async def call(
        self, function: Callable[Parameters, Value], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Value:
        """The function's answer, from a thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, functools.partial(function, *args, **kwargs))

    async def ask(
        self, function: Callable[Parameters, Value], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Value:
        """The same for a caller who waits; raises Fault (OPERATIONS_DATABASE_AWAY)."""
        give_up = asyncio.get_running_loop().time() + _PATIENCE_S
        while True:
            try:
                return await self.call(function, *args, **kwargs)
            except _AWAY as error:
                if asyncio.get_running_loop().time() >= give_up:
                    log.warning("operations database is away", error=str(error.__cause__ or error))
                    raise faults.unavailable(
                        "OPERATIONS_DATABASE_AWAY",
                        "the database that keeps the operations does not answer; retry later",
                        retry_after_ms=int(_PATIENCE_S * 1000),
                    ) from error
            await asyncio.sleep(_RETRY_S)

    async def insist(
        self, function: Callable[Parameters, Value], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Value:
        """The same for work that must be written down, however long it takes; raises LeavingError."""
        told = False
        while True:
            try:
                return await self.call(function, *args, **kwargs)
            except _AWAY as error:
                if self.leaving:
                    raise LeavingError from error
                if not told:
                    log.warning("operations database is away", error=str(error.__cause__ or error))
                    told = True
            await asyncio.sleep(_RETRY_S)
