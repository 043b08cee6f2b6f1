"""What the choice of an endpoint is made from."""

from collections.abc import Sequence
from typing import Protocol

from services.gateway.endpoint import Endpoint, State


class PoolLike(Protocol):
    """A pool, or the part of it that can do a call."""

    @property
    def name(self) -> str: ...
    @property
    def service(self) -> str: ...
    @property
    def hardware(self) -> str: ...
    @property
    def endpoints(self) -> Sequence[Endpoint]: ...
    def count(self, state: State) -> int:
        """Endpoints in that state."""

    def describe(self) -> str:
        """For people."""


# Each tier is tried before the next; within one, load decides.
Tiers = tuple[tuple[PoolLike, ...], ...]
