"""The fleet: every pool with its endpoints, found through DNS or fixed, watched, and chosen from."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Sequence
from typing import Any

import structlog

from services.gateway.config import GatewayConfig, PoolConfig, parse_target
from services.gateway.discovery import Resolver, addresses, resolve_host
from services.gateway.endpoint import ChannelOptions, Endpoint, State
from services.gateway.preference import Preference
from services.kit import faults

log = structlog.get_logger(__name__)

# What a caller is told to wait when nothing is ready: about what a restarted service takes to be noticed.
RETRY_AFTER_MS = 1000

Tiers = tuple[tuple["Pool", ...], ...]


class Pool:
    """Endpoints that run one service on one kind of hardware. `endpoints` are those in use now."""

    def __init__(
        self,
        config: PoolConfig,
        *,
        options: ChannelOptions,
        resolver: Resolver,
        resolve_interval_s: float,
        on_change: Callable[[], None],
    ) -> None:
        self.name = config.name
        self.service = config.service
        self.hardware = config.hardware
        self.targets = tuple(parse_target(text) for text in config.targets)
        self.endpoints: list[Endpoint] = []
        self._found: dict[str, list[str]] = {}  # addresses of each target, by its text
        self._options = options
        self._resolver = resolver
        self._interval = resolve_interval_s
        self._on_change = on_change
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Find the endpoints once, and keep looking where names are to be resolved."""
        await asyncio.gather(*(self._look_up(i) for i in range(len(self.targets))))
        self._apply()
        if any(target.resolve for target in self.targets):
            self._spawn(self._keep_looking(), f"resolve {self.name}")

    async def stop(self) -> None:
        """Close everything."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(endpoint.close() for endpoint in self.endpoints))
        self.endpoints = []

    def count(self, state: State) -> int:
        """Endpoints in that state."""
        return sum(endpoint.state is state for endpoint in self.endpoints)

    def describe(self) -> str:
        """For people: "ocr-cuda (2 unreachable, 1 not_ready)"."""
        counted = [f"{n} {state.value}" for state in State if (n := self.count(state))]
        return f"{self.name} ({', '.join(counted) or 'no endpoints'})"

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await asyncio.gather(*(self._look_up(i) for i, t in enumerate(self.targets) if t.resolve))
            self._apply()

    async def _look_up(self, index: int) -> None:
        target = self.targets[index]
        try:
            self._found[target.text] = await addresses(target, self._resolver)
        except OSError as error:
            # A name server that is away must not empty the pool: what was found last stays in use.
            log.warning("cannot resolve", pool=self.name, target=target.text, error=str(error))

    def _apply(self) -> None:
        wanted = dict.fromkeys(a for t in self.targets for a in self._found.get(t.text, ()))
        leaving = [e for e in self.endpoints if e.address not in wanted]
        present = {e.address for e in self.endpoints}
        joining = [
            Endpoint(
                address,
                pool=self.name,
                hardware=self.hardware,
                options=self._options,
                on_change=lambda _endpoint: self._on_change(),
            )
            for address in wanted
            if address not in present
        ]
        if not leaving and not joining:
            return
        self.endpoints = [e for e in self.endpoints if e.address in wanted] + joining
        for endpoint in joining:
            endpoint.start()
        for endpoint in leaving:
            self._spawn(self._let_go(endpoint), f"drain {endpoint.address}")
        self._on_change()

    async def _let_go(self, endpoint: Endpoint) -> None:
        # No new call goes there any more; those under way may finish.
        log.info("endpoint leaves", pool=self.name, address=endpoint.address, in_flight=endpoint.in_flight)
        try:
            await endpoint.drained()
        finally:
            await endpoint.close()

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class Fleet:
    """All pools, and the choice among their endpoints.

    on_change: called after any endpoint changed its state, came or went.
    """

    def __init__(
        self,
        config: GatewayConfig,
        *,
        options: ChannelOptions | None = None,
        resolver: Resolver = resolve_host,
        resolve_interval_s: float = 5.0,
    ) -> None:
        self._config = config
        self.on_change: Callable[[], None] = lambda: None
        self.pools = [
            Pool(
                pool,
                options=options or ChannelOptions(),
                resolver=resolver,
                resolve_interval_s=resolve_interval_s,
                on_change=self._changed,
            )
            for pool in config.pools
        ]
        self._turns = 0
        self._tiers: dict[tuple[str, Preference], Tiers] = {}
        self._change = asyncio.Event()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Watches and channels live inside this."""
        try:
            await asyncio.gather(*(pool.start() for pool in self.pools))
            yield
        finally:
            await asyncio.gather(*(pool.stop() for pool in self.pools))

    def ready(self, service: str | None = None) -> bool:
        """Whether some endpoint (of that service) can be given calls."""
        return any(pool.count(State.READY) for pool in self.pools if service in (None, pool.service))

    def tiers(self, service: str, preference: Preference) -> Tiers:
        """The pools that may serve a call, in tiers of the same hardware label, best first.

        Raises Fault: NOT_FOUND if the service has no pool, FAILED_PRECONDITION if only labels without a pool may serve.
        """
        key = (service, preference)
        found = self._tiers.get(key)
        if found is None:
            found = self._make_tiers(service, preference)
            if len(self._tiers) < 1024:  # callers choose preferences, so their number is bounded here
                self._tiers[key] = found
        return found

    def _make_tiers(self, service: str, preference: Preference) -> Tiers:
        pools = [pool for pool in self.pools if pool.service == service]
        if not pools:
            raise faults.not_found("pool", service, sorted({pool.service for pool in self.pools}), field="service")
        default = dict.fromkeys([*self._config.defaults.get(service, ()), *(pool.hardware for pool in pools)])
        order = preference.order(default)
        tiers = tuple(tier for label in order if (tier := tuple(pool for pool in pools if pool.hardware == label)))
        if not tiers:
            here = ", ".join(dict.fromkeys(pool.hardware for pool in pools))
            raise faults.failed_precondition(
                "HARDWARE_NOT_AVAILABLE",
                f"metadata.inkwell-hardware asks for nothing but {', '.join(preference.labels)}, and no pool of "
                f"{service} has that; here are: {here}",
                service=service,
                available=here,
            )
        return tiers

    def choose(self, tiers: Tiers, tried: Collection[Endpoint] = ()) -> Endpoint | None:
        """The ready endpoint with the fewest calls under way in the best tier that has one outside `tried`.

        Of several, the one chosen longest ago. None if there is none.
        """
        for tier in tiers:
            best: Endpoint | None = None
            for pool in tier:
                for endpoint in pool.endpoints:
                    if endpoint.state is not State.READY or endpoint in tried:
                        continue
                    if (
                        best is None
                        or endpoint.in_flight < best.in_flight
                        or (endpoint.in_flight == best.in_flight and endpoint.turn < best.turn)
                    ):
                        best = endpoint
            if best is not None:
                return best
        return None

    def next_turn(self) -> int:
        """A number for Endpoint.begin, larger than any before."""
        self._turns += 1
        return self._turns

    async def wait_change(self) -> None:
        """Return after the next change of any endpoint."""
        await self._change.wait()

    def _changed(self) -> None:
        waited, self._change = self._change, asyncio.Event()
        waited.set()
        self.on_change()


def none_ready(tiers: Sequence[Sequence[Pool]]) -> faults.Fault:
    """The fault of a call whose pools have no ready endpoint."""
    described = "; ".join(pool.describe() for tier in tiers for pool in tier)
    return faults.unavailable(
        "NO_READY_ENDPOINT",
        f"no endpoint is ready in the pools that may serve this call: {described}",
        retry_after_ms=RETRY_AFTER_MS,
    )
