"""The fleet: every pool with its endpoints, found through DNS or fixed, watched, and chosen from."""

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import structlog

from services.gateway import balance, ejection, retry, selectors
from services.gateway.asked import Asked
from services.gateway.balance import BalanceRules
from services.gateway.config import ConfigError, GatewayConfig, PoolConfig, Target, parse_target
from services.gateway.discovery import NameWatch, Resolver, resolve_host
from services.gateway.ejection import EjectionRules
from services.gateway.endpoint import ChannelOptions, Endpoint, State
from services.gateway.kubernetes import ApiServer, SliceWatch
from services.gateway.operations_home import OperationsHome
from services.gateway.placing import Placing
from services.gateway.preference import Preference
from services.gateway.tiers import PoolLike, Tiers
from services.kit import faults

log = structlog.get_logger(__name__)

# What a caller is told to wait when nothing is ready: about what a restarted service takes to be noticed.
RETRY_AFTER_MS = 1000
# How long the start waits for the first answer about a target. It may well come later; there are other pools.
_FIRST_ANSWER_S = 5.0


@dataclass(frozen=True, slots=True)
class Ways:
    """How endpoints are found, connected to, chosen and left out. kubernetes: None if there is no API server to ask."""

    options: ChannelOptions = ChannelOptions()
    resolver: Resolver = resolve_host
    resolve_interval_s: float = 2.0
    kubernetes: ApiServer | None = None
    load_interval_s: float = 1.0
    balance: BalanceRules = BalanceRules()
    ejection: EjectionRules = EjectionRules()


class Pool:
    """Endpoints that run one service on one kind of hardware. `endpoints` are those in use now.

    ejections: how often an endpoint was left out for its failures, by reason. Raises ConfigError for a target that
    cannot be followed from here.
    """

    def __init__(self, config: PoolConfig, ways: Ways, *, on_change: Callable[[], None]) -> None:
        self.config = config
        self.name = config.name
        self.service = config.service
        self.hardware = config.hardware
        self.targets = tuple(parse_target(text) for text in config.targets)
        for target in self.targets:
            if target.namespace and ways.kubernetes is None:
                raise ConfigError(
                    f"pool {self.name}: {target.text} needs a Kubernetes API server, and this process runs in no pod;"
                    " set INKWELL_GATEWAY_KUBERNETES_URL"
                )
        self.endpoints: list[Endpoint] = []
        self.ejections = dict.fromkeys(ejection.REASONS, 0)
        self._found: dict[str, list[str]] = {}  # addresses of each target, by its text
        self._names: list[NameWatch] = []
        self._ways = ways
        self._on_change = on_change
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Find the endpoints, and keep looking where they may change; returns when each target has answered once."""
        first: list[Coroutine[Any, Any, None]] = []
        for target in self.targets:
            found = functools.partial(self._find, target)
            if target.namespace:
                assert self._ways.kubernetes is not None
                slices = SliceWatch(target, self._ways.kubernetes, found=found)
                self._spawn(slices.run(), f"resolve {target.text}")
                first.append(slices.listed())
            elif target.resolve:
                names = NameWatch(target, self._ways.resolver, interval_s=self._ways.resolve_interval_s, found=found)
                self._names.append(names)
                first.append(names.look())
            else:
                self._found[target.text] = [target.address]
        self._apply()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_ANSWER_S):
                await asyncio.gather(*first)
        for names in self._names:
            self._spawn(names.run(), f"resolve {self.name}")

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

    def _find(self, target: Target, addresses: list[str]) -> None:
        self._found[target.text] = addresses
        self._apply()

    def _changed(self, endpoint: Endpoint) -> None:
        if endpoint.state is State.UNREACHABLE:
            for names in self._names:
                names.soon()
        self._on_change()

    def _failed(self, endpoint: Endpoint) -> None:
        now = time.monotonic()
        others = [e.record for e in self.endpoints if e is not endpoint and e.state is State.READY]
        reason = ejection.verdict(endpoint.record, others, now, self._ways.ejection)
        if reason is None:
            return
        seconds = endpoint.record.eject(now)
        self.ejections[reason] += 1
        endpoint.last_error = f"left out for {seconds:g} s ({reason}); the last was {endpoint.last_error}"
        log.warning("endpoint left out", pool=self.name, address=endpoint.address, reason=reason, seconds=seconds)
        self._spawn(self._bring_back(endpoint, seconds), f"bring back {endpoint.address}")
        self._on_change()

    async def _bring_back(self, endpoint: Endpoint, seconds: float) -> None:
        while endpoint in self.endpoints:
            await asyncio.sleep(seconds)
            if await endpoint.serves():
                log.info("endpoint on trial", pool=self.name, address=endpoint.address)
                endpoint.record.try_again()
                self._on_change()
                return

    def _apply(self) -> None:
        wanted = dict.fromkeys(a for t in self.targets for a in self._found.get(t.text, ()))
        leaving = [e for e in self.endpoints if e.address not in wanted]
        present = {e.address for e in self.endpoints}
        joining = [
            Endpoint(
                address,
                pool=self.name,
                hardware=self.hardware,
                options=self._ways.options,
                server_name=self._server_name(address),
                on_change=self._changed,
                on_failure=self._failed,
                ejection=self._ways.ejection,
                load_interval_s=self._ways.load_interval_s,
                misplaced=functools.partial(selectors.misplaced, self.hardware, self.config.select),
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

    def _server_name(self, address: str) -> str:
        # Found by a name, an endpoint goes by its IP address, which is in no certificate.
        target = next(t for t in self.targets if address in self._found.get(t.text, ()))
        if target.namespace:
            return f"{target.host}.{target.namespace}.svc"
        return target.host if target.resolve else ""

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

    def __init__(self, config: GatewayConfig, ways: Ways | None = None) -> None:
        self.configured = 1  # times that a configuration came into use
        self._ways = ways or Ways()
        self.on_change: Callable[[], None] = lambda: None
        self.pools = [Pool(pool, self._ways, on_change=self._changed) for pool in config.pools]
        self._turns = 0
        self._generation = 0  # changes of endpoints so far
        self._placing = self._place_by(config)
        self.homes = OperationsHome(self._endpoints_of)
        self._retiring: set[asyncio.Task[None]] = set()
        self._change = asyncio.Event()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Watches and channels live inside this."""
        tls = self._ways.options.tls
        try:
            await asyncio.gather(*(pool.start() for pool in self.pools))
            async with contextlib.nullcontext() if tls is None else tls.followed(self._renew):
                yield
        finally:
            for task in self._retiring:
                task.cancel()
            await asyncio.gather(*self._retiring, return_exceptions=True)
            await asyncio.gather(*(pool.stop() for pool in self.pools))

    def _renew(self) -> None:
        for pool in self.pools:
            for endpoint in pool.endpoints:
                endpoint.renew()

    async def apply(self, config: GatewayConfig) -> None:
        """Use this configuration from now on. Raises ConfigError, and changes nothing then.

        Pools that stay as they are keep their connections. Others are made first, given a moment to become ready, and
        take over then; those that they replace finish their calls.
        """
        pools = [
            next((pool for pool in self.pools if pool.config == wanted), None)
            or Pool(wanted, self._ways, on_change=self._changed)
            for wanted in config.pools
        ]
        joining = [pool for pool in pools if pool not in self.pools]
        leaving = [pool for pool in self.pools if pool not in pools]
        try:
            await asyncio.gather(*(pool.start() for pool in joining))
            poorer = {pool.service for pool in leaving}
            await self._wait_ready([pool for pool in joining if pool.service in poorer])
        except BaseException:
            await asyncio.gather(*(pool.stop() for pool in joining))
            raise
        self.pools = pools
        self.configured += 1
        self._placing = self._place_by(config)
        for pool in leaving:
            task = asyncio.create_task(_retire(pool), name=f"retire {pool.name}")
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
        self._changed()

    async def _wait_ready(self, pools: Sequence[Pool]) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._ways.options.connect_timeout_s):
                while not all(pool.count(State.READY) for pool in pools):
                    await self.wait_change()

    def _place_by(self, config: GatewayConfig) -> Placing:
        return Placing(config, self.pools, generation=lambda: self._generation)

    def _endpoints_of(self, service: str) -> list[Endpoint]:
        return [endpoint for pool in self.pools if pool.service == service for endpoint in pool.endpoints]

    def ready(self, service: str | None = None) -> bool:
        """Whether some endpoint (of that service) can be given calls."""
        return any(pool.count(State.READY) for pool in self.pools if service in (None, pool.service))

    def tiers(self, asked: Asked, preference: Preference, *, home: str | None = None) -> Tiers:
        """As `Placing.tiers`, by the configuration in use."""
        return self._placing.tiers(asked, preference, home=home)

    def reads_streams(self, service: str) -> bool:
        """As `Placing.reads_streams`."""
        return self._placing.reads_streams(service)

    def cannot(self, endpoint: Endpoint, asked: Asked, error: grpc.aio.AioRpcError) -> bool:
        """Whether the endpoint has refused the call for what it is, so that another may well do it.

        That a model is too large for it is remembered until it next reports something new of itself.
        """
        reason = retry.lacks(error)
        if reason == retry.MODEL_TOO_LARGE and asked.model and asked.model not in endpoint.too_large:
            endpoint.too_large.add(asked.model)
            self._changed()
        return bool(reason)

    def choose(self, tiers: Tiers, tried: Collection[Endpoint] = ()) -> Endpoint | None:
        """As `balance.choose`, now."""
        return balance.choose(tiers, tried, time.monotonic(), self._ways.balance)

    def expected_wait_s(self, endpoint: Endpoint) -> float:
        """As `balance.expected_wait_s`, now."""
        return balance.expected_wait_s(endpoint, time.monotonic(), self._ways.balance)

    def next_turn(self) -> int:
        """A number for Endpoint.begin, larger than any before."""
        self._turns += 1
        return self._turns

    async def wait_change(self) -> None:
        """Return after the next change of any endpoint."""
        await self._change.wait()

    def _changed(self) -> None:
        self._generation += 1
        waited, self._change = self._change, asyncio.Event()
        waited.set()
        self.on_change()


async def _retire(pool: Pool) -> None:
    log.info("pool leaves", pool=pool.name)
    try:
        await asyncio.gather(*(endpoint.drained() for endpoint in pool.endpoints))
    finally:
        await pool.stop()


def none_ready(tiers: Sequence[Sequence[PoolLike]]) -> faults.Fault:
    """The fault of a call whose pools have no ready endpoint."""
    described = "; ".join(pool.describe() for tier in tiers for pool in tier)
    return faults.unavailable(
        "NO_READY_ENDPOINT",
        f"no endpoint is ready in the pools that may serve this call: {described}",
        retry_after_ms=RETRY_AFTER_MS,
    )
