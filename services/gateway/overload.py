"""Calls at the doors of the pools: each is let in, made to wait for its turn, or refused at once.

The rules are those of services.gateway.gate, fairness, limiter and budget; here is what waits.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from services.gateway.budget import RetryBudget
from services.gateway.endpoint import Endpoint, State
from services.gateway.gate import Bounds, CallerBound, Gate, Ticket
from services.gateway.limiter import AdaptiveLimit, Said
from services.gateway.pools import Fleet, Pool, none_ready
from services.gateway.settings import Settings
from services.gateway.tiers import Tiers
from services.kit import faults
from services.kit.admission import Priority
from services.kit.faults import Fault

# Of refusals that come before a pool is chosen.
_NO_POOL = "none"


@dataclass(eq=False, slots=True)
class _Waiter:
    granted: asyncio.Future[bool]  # False: look for another pool
    tiers: Tiers
    ends_at: float | None  # its deadline, on the loop's clock
    timeout: asyncio.Timeout | None = None


@dataclass(eq=False, slots=True)
class _Door:
    """One pool's gate and those who stand before it."""

    pool: Pool
    gate: Gate
    budget: RetryBudget
    waiters: dict[Ticket, _Waiter] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Place:
    """What an admitted call holds until `Overload.leave`."""

    caller: str
    door: _Door
    ticket: Ticket


class Overload:
    """The doors of all pools of a fleet. Made and used on one event loop.

    `fleet_changed` is to be called after every change of the fleet.
    """

    def __init__(
        self,
        fleet: Fleet,
        settings: Settings,
        registry: CollectorRegistry,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fleet = fleet
        self._settings = settings
        self._clock = clock
        self._bounds = Bounds(
            queue_limit=settings.queue_limit,
            wait_s=settings.queue_wait_s,
            overload_ends_s=settings.overload_ends_s,
            ageing_s=settings.priority_ageing_s,
            stream_limit=settings.stream_limit,
        )
        self._callers = CallerBound(settings.caller_limit)
        self._doors: dict[str, _Door] = {}
        self._refusals = Counter(
            "inkwell_gateway_refused",
            "Calls that were refused at the door, by the pool they were for and the reason told.",
            ["pool", "reason"],
            registry=registry,
        )
        self._waits = Histogram(
            "inkwell_gateway_wait_seconds",
            "Time that calls waited for a place in their pool, of those that did.",
            ["pool"],
            buckets=(0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=registry,
        )
        self._not_retried = Counter(
            "inkwell_gateway_retries_over_budget",
            "Failed attempts that were not made again because too many of the pool's calls are retries already.",
            ["pool"],
            registry=registry,
        )
        registry.register(_DoorCollector(self._doors))
        self.fleet_changed()

    async def admit(
        self,
        find: Callable[[], Tiers],
        *,
        caller: str,
        priority: Priority,
        ends_at: float | None,
        counted: bool,
    ) -> tuple[Place, Endpoint]:
        """A place for a call and the endpoint to send it to; waits for its turn if need be.

        find: answers the pools that may serve it. ends_at: its deadline on the loop's clock. counted: False for a call
        whose requests are a stream, see Gate.enter.

        Raises Fault: whatever `find` raises, UNAVAILABLE without an endpoint that is ready or on its way, OVERLOADED
        and DEADLINE as Gate.enter and CallerBound.enter do.
        """
        with self._refusing(_NO_POOL):
            self._callers.enter(caller)
        try:
            door, ticket, endpoint = await self._enter(find, caller, priority, ends_at, counted)
        except BaseException:
            self._callers.leave(caller)
            raise
        door.budget.call()
        return Place(caller, door, ticket), endpoint

    def leave(self, place: Place, *, method: str, began: float, seconds: float | None) -> None:
        """The call is over.

        seconds: how long its endpoint took from `began` (time.monotonic) on; None if that says nothing about the
        endpoint, of a call that failed for instance.
        """
        door, ticket = place.door, place.ticket
        if seconds is not None:
            door.gate.sample(ticket, method, began=began, seconds=seconds)
        door.gate.leave(ticket, completed=seconds is not None)
        self._callers.leave(place.caller)
        if door.waiters:
            self._pump(door)

    def may_retry(self, pool: str) -> bool:
        """Whether a call that failed in that pool may be tried again; if so it is paid for."""
        allowed = self._door(pool).budget.take()
        if not allowed:
            self._not_retried.labels(pool).inc()
        return allowed

    def move(self, place: Place, pool: str) -> None:
        """The call is tried again in that pool."""
        if place.door.pool.name == pool:
            return
        old, ticket = place.door, place.ticket
        place.door = self._door(pool)
        place.ticket = place.door.gate.move_in(place.caller, counted=ticket.counted)
        self._give_up(old, ticket)

    def endpoint_full(self, pool: str) -> None:
        """An endpoint of that pool refused a call because its own queue is full."""
        self._door(pool).gate.adaptive.overloaded()

    def fleet_changed(self) -> None:
        """Endpoints came, went or changed their state: who waits may go in, or has to look elsewhere."""
        pools = {pool.name: pool for pool in self._fleet.pools}
        for pool in pools.values():
            door = self._doors.get(pool.name)
            if door is None:
                door = self._doors[pool.name] = self._make_door(pool)
            door.pool = pool
            self._count_ready(door, pool.count(State.READY))
        for name in [name for name in self._doors if name not in pools]:
            # Calls under way there hold the door itself.
            self._count_ready(self._doors.pop(name), 0, gone=True)

    def _count_ready(self, door: _Door, ready: int, *, gone: bool = False) -> None:
        before = door.gate.endpoints
        door.gate.set_endpoints(ready, _said(door.pool))
        if not door.waiters:
            return
        self._pump(door)
        for ticket, waiter in list(door.waiters.items()):
            if waiter.granted.done():
                continue
            if ready and not before and waiter.timeout is not None and not waiter.timeout.expired():
                # There is something to wait for now, so only the deadline ends it.
                waiter.timeout.reschedule(waiter.ends_at)
            elif not ready and (before or gone or self._fleet.choose(waiter.tiers) is not None):
                door.gate.leave(ticket)
                waiter.granted.set_result(False)

    async def _enter(
        self, find: Callable[[], Tiers], caller: str, priority: Priority, ends_at: float | None, counted: bool
    ) -> tuple[_Door, Ticket, Endpoint]:
        admitted = False  # has waited already
        patience_ends: float | None = None
        while True:
            tiers = find()
            endpoint = self._fleet.choose(tiers)
            if endpoint is None:
                with self._refusing(_NO_POOL):
                    door, patience_s = self._waking(tiers, admitted)
                if patience_ends is None:
                    patience_ends = asyncio.get_running_loop().time() + patience_s
            else:
                door, endpoint = self._with_room(tiers, endpoint)
                patience_ends = None
            time_left = None if ends_at is None else ends_at - asyncio.get_running_loop().time()
            with self._refusing(door.pool.name):
                ticket = door.gate.enter(
                    caller,
                    priority,
                    time_left_s=time_left,
                    counted=counted or endpoint is None,
                    admitted=admitted,
                )
            if ticket.inside and endpoint is not None:
                return door, ticket, endpoint
            granted = ticket.inside or await self._wait(door, ticket, tiers, ends_at, patience_ends)
            admitted = True
            if granted:
                if counted:
                    # Of the pool, what can do this call.
                    part = tuple(pool for tier in tiers for pool in tier if pool.name == door.pool.name)
                    chosen = self._fleet.choose((part,))
                    if chosen is not None:
                        return door, ticket, chosen
                self._give_up(door, ticket)

    def _with_room(self, tiers: Tiers, endpoint: Endpoint) -> tuple[_Door, Endpoint]:
        door = self._door(endpoint.pool)
        if door.gate.has_room:
            return door, endpoint
        for tier in tiers:
            if any(p.name == door.pool.name for p in tier):
                beside = tuple(p for p in tier if p.name != door.pool.name and self._door(p.name).gate.has_room)
                other = self._fleet.choose((beside,)) if beside else None
                if other is not None:
                    return self._door(other.pool), other
        return door, endpoint

    def _waking(self, tiers: Tiers, admitted: bool) -> tuple[_Door, float]:
        # Where to wait for an endpoint, and for how many seconds; raises Fault if none is to be expected.
        for tier in tiers:
            for pool in tier:
                door = self._door(pool.name)
                if door.gate.endpoints == 0 and (admitted or _is_waking(door.pool)):
                    patience_s = self._settings.retry_wait_s if admitted else self._settings.wake_wait_s
                    if patience_s > 0:
                        return door, patience_s
        raise none_ready(tiers)

    async def _wait(
        self, door: _Door, ticket: Ticket, tiers: Tiers, ends_at: float | None, patience_ends: float | None
    ) -> bool:
        waiter = _Waiter(asyncio.get_running_loop().create_future(), tiers, ends_at)
        door.waiters[ticket] = waiter
        began = self._clock()
        ends = [when for when in (ends_at, patience_ends) if when is not None]
        try:
            async with asyncio.timeout_at(min(ends, default=None)) as timeout:
                waiter.timeout = timeout
                return await waiter.granted
        except TimeoutError:
            self._give_up(door, ticket)
            if ends_at is not None and timeout.when() == ends_at:
                fault = faults.deadline_too_short(
                    f"it waited {(self._clock() - began) * 1000:.0f} ms for a place in pool {door.pool.name}, and no"
                    " time is left"
                )
            else:
                fault = none_ready(tiers)
            self._refusals.labels(door.pool.name, fault.data.reason).inc()
            raise fault from None
        except asyncio.CancelledError:
            self._give_up(door, ticket)
            raise
        finally:
            del door.waiters[ticket]
            self._waits.labels(door.pool.name).observe(self._clock() - began)

    def _give_up(self, door: _Door, ticket: Ticket) -> None:
        door.gate.leave(ticket)
        self._pump(door)

    def _pump(self, door: _Door) -> None:
        while (ticket := door.gate.grant_next()) is not None:
            waiter = door.waiters[ticket]
            if waiter.granted.done():  # its task was cancelled, and does not know yet
                door.gate.leave(ticket)
            else:
                waiter.granted.set_result(True)

    def _door(self, pool: str) -> _Door:
        door = self._doors.get(pool)
        if door is None:
            self.fleet_changed()
            door = self._doors[pool]
        return door

    def _make_door(self, pool: Pool) -> _Door:
        settings = self._settings
        limit = AdaptiveLimit(
            least=settings.limit_least, initial=settings.limit_initial, most=settings.limit_most, clock=self._clock
        )
        gate = Gate(pool.name, self._bounds, limit, clock=self._clock, spread=lambda: random.uniform(1.0, 1.5))
        return _Door(
            pool,
            gate,
            RetryBudget(
                ratio=settings.retry_ratio,
                reserve=settings.retry_reserve,
                refill_per_s=settings.retry_refill_per_s,
                clock=self._clock,
            ),
        )

    def _refusing(self, pool: str) -> "_Refusing":
        return _Refusing(self._refusals, pool)


class _Refusing:
    """Counts a Fault that is raised within it. A class, since every call goes through two of them."""

    __slots__ = ("_pool", "_refusals")

    def __init__(self, refusals: Counter, pool: str) -> None:
        self._refusals = refusals
        self._pool = pool

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Fault):
            self._refusals.labels(self._pool, error.data.reason).inc()


def _is_waking(pool: Pool) -> bool:
    # Scaled to zero, or its first endpoints are on their way and have never been ready.
    return all(e.state in (State.CONNECTING, State.NOT_READY) and not e.was_ready for e in pool.endpoints)


def _said(pool: Pool) -> Said:
    ready = [e for e in pool.endpoints if e.state is State.READY]
    loads = [e.load for e in ready if e.load is not None]
    call_s = [load.call_s for load in loads if load.call_s]
    return Said(
        slots=sum(load.slots for load in loads),
        all_said=len(loads) == len(ready) > 0,
        call_s=sum(call_s) / len(call_s) if call_s else 0.0,
    )


class _DoorCollector(Collector):
    def __init__(self, doors: dict[str, _Door]) -> None:
        self._doors = doors

    def collect(self) -> Iterator[GaugeMetricFamily]:
        waiting = GaugeMetricFamily("inkwell_gateway_waiting", "Calls that wait for a place, by pool.", labels=["pool"])
        admitted = GaugeMetricFamily(
            "inkwell_gateway_admitted",
            "Calls that have a place in the pool, by pool; those about operations need none.",
            labels=["pool"],
        )
        limit = GaugeMetricFamily(
            "inkwell_gateway_limit", "Calls that the pool is given at a time, as learned from latency.", labels=["pool"]
        )
        retries = GaugeMetricFamily("inkwell_gateway_retry_budget", "Retries that may be made now.", labels=["pool"])
        for name, door in list(self._doors.items()):
            waiting.add_metric([name], door.gate.waiting)
            admitted.add_metric([name], door.gate.under_way + door.gate.streams)
            limit.add_metric([name], door.gate.limit)
            retries.add_metric([name], door.budget.left)
        yield from (waiting, admitted, limit, retries)
