"""Where an operation lives. Each server keeps its operations in a database, its own or one that several share."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence

import grpc
from google.longrunning import operations_pb2

from services.gateway.asked import Asked
from services.gateway.endpoint import Endpoint, State
from services.gateway.metadata import Metadata
from services.gateway.methods import METHODS
from services.kit import faults

# Homes are small, and what is forgotten is asked for again.
_REMEMBERED = 10_000
_ASK_WITHIN_S = 2.0
_RETRY_AFTER_MS = 1000
_GET = METHODS["/google.longrunning.Operations/GetOperation"]


class OperationsHome:
    """Remembers the homes of the operations that went by, and asks for those of others.

    endpoints: answers all endpoints of a service.
    """

    def __init__(self, endpoints: Callable[[str], Sequence[Endpoint]]) -> None:
        self._endpoints = endpoints
        self._homes: OrderedDict[str, str] = OrderedDict()

    def learn(self, operation: str, endpoint: Endpoint) -> None:
        """An endpoint answered with this operation, so it is kept there."""
        if operation:
            self._homes[operation] = endpoint.store
            self._homes.move_to_end(operation)
            if len(self._homes) > _REMEMBERED:
                self._homes.popitem(last=False)

    async def find(self, asked: Asked, *, metadata: Metadata, time_left_s: float | None) -> str | None:
        """The store that the call has to go to; None if any endpoint of the service will do.

        Of a call that begins an operation under an id of its caller's choice, that is the store where the id is known
        already: the same request is then the same operation. If nobody who answers knows the id, the call is free.

        Raises Fault (UNAVAILABLE, OPERATION_HOME_UNREACHABLE) if a server that may have the operation does not answer.
        """
        endpoints = self._endpoints(asked.method.service)
        stores = dict.fromkeys(endpoint.store for endpoint in endpoints)
        if len(stores) < 2:
            return None
        known = self._homes.get(asked.operation)
        if known in stores:
            return known
        ready = {e.store: e for e in reversed(endpoints) if e.state is State.READY}
        within = _ASK_WITHIN_S if time_left_s is None else max(0.0, min(_ASK_WITHIN_S, time_left_s / 2))
        answers = await asyncio.gather(*(_has(e, asked.operation, metadata, within) for e in ready.values()))
        for store, has in zip(ready, answers, strict=True):
            if has:
                self.learn(asked.operation, ready[store])
                return store
        silent = [s for s in stores if s not in ready] + [
            s for s, has in zip(ready, answers, strict=True) if has is None
        ]
        if silent and not asked.begins:
            names = ", ".join(e.address for e in endpoints if e.store in silent)
            raise faults.unavailable(
                "OPERATION_HOME_UNREACHABLE",
                f"{asked.operation} is on none of the servers that answer, and these do not: {names}",
                retry_after_ms=_RETRY_AFTER_MS,
            )
        return None


async def _has(endpoint: Endpoint, operation: str, metadata: Metadata, within_s: float) -> bool | None:
    """Whether the endpoint knows the operation; None if it did not say."""
    request = operations_pb2.GetOperationRequest(name=operation).SerializeToString()
    try:
        await endpoint.stub(_GET)(request, timeout=within_s, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        return False if error.code() is grpc.StatusCode.NOT_FOUND else None
    return True
