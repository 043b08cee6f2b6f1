"""The routes of the configuration: which of them a call falls under, and shares of calls by weight."""

import fnmatch
from collections.abc import Mapping, Sequence

from services.gateway.asked import Asked
from services.gateway.config import RouteConfig
from services.gateway.tiers import PoolLike, Tiers


def find_route(routes: Sequence[RouteConfig], asked: Asked) -> tuple[int, RouteConfig | None]:
    """The first route that the call falls under, with its place in the file; (-1, None) if there is none.

    Calls about an operation that there is already fall under none: it lives where it lives.
    """
    if asked.operation and not asked.begins:
        return -1, None
    name = asked.method.path.rpartition("/")[2]
    for number, route in enumerate(routes):
        if route.service != asked.method.service or (route.methods and name not in route.methods):
            continue
        if route.models and not any(fnmatch.fnmatchcase(asked.model, pattern) for pattern in route.models):
            continue
        return number, route
    return -1, None


class Draw:
    """Shares calls among pools by weight, smoothly: of every `sum of weights` calls each pool has exactly its own.

    weights: at least 0 by the pool's name; of a hardware label all pools or none, which the configuration sees to. A
    pool of weight 0 is given nothing.

    The smooth weighted round-robin: each time, every pool's credit grows by its weight, the one with most is taken and
    pays the sum. Nothing is left to chance, so a canary of 1 in 100 gets its call within the first hundred.
    """

    def __init__(self, weights: Mapping[str, int]) -> None:
        self._weights = weights
        self._credit: dict[tuple[str, ...], dict[str, int]] = {}  # by the names of the pools that share a tier

    def next(self, tiers: Tiers) -> Tiers:
        """The tiers for one call: the pool whose turn it is in a tier of its own, before the others of its tier."""
        drawn: list[tuple[PoolLike, ...]] = []
        for tier in tiers:
            if not any(pool.name in self._weights for pool in tier):
                drawn.append(tier)  # another label's, of which the weights say nothing
                continue
            pools = {pool.name: pool for pool in tier if self._weights.get(pool.name, 0) > 0}
            if not pools:
                continue
            name = self._take(tuple(pools))
            drawn.append((pools.pop(name),))
            if pools:
                drawn.append(tuple(pools.values()))
        return tuple(drawn)

    def _take(self, names: tuple[str, ...]) -> str:
        if len(names) == 1:
            return names[0]
        credit = self._credit.setdefault(names, dict.fromkeys(names, 0))
        for name in names:
            credit[name] += self._weights[name]
        taken = max(names, key=lambda name: credit[name])
        credit[taken] -= sum(self._weights[name] for name in names)
        return taken
