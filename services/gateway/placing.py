"""Where one kind of call may go: the policy's order of pools, less the endpoints that cannot do it."""

from collections.abc import Callable, Sequence

from services.gateway.asked import Asked
from services.gateway.config import GatewayConfig, RouteConfig
from services.gateway.endpoint import Endpoint, State
from services.gateway.policy import Draw, find_route
from services.gateway.preference import NO_PREFERENCE, Preference
from services.gateway.tiers import PoolLike, Tiers
from services.kit import faults

# Callers choose models and preferences, so their number is bounded here.
_KEPT = 1024
_TENSORRT_LABELS = ("cuda",)

WhyNot = Callable[[Endpoint], str]


class Fit:
    """Which endpoints of some pools can do a call, kept until the fleet changes.

    hard: what an endpoint must not lack. soft: what tells against an endpoint as long as there is another; if there is
    none, the service is the one to say what is wrong. Both answer in words, "" for nothing. generation: counts changes.
    """

    def __init__(self, pools: Sequence[PoolLike], *, hard: WhyNot, soft: WhyNot, generation: Callable[[], int]) -> None:
        self._pools = pools
        self._hard = hard
        self._soft = soft
        self._generation = generation
        self._seen = -1
        self._able: set[Endpoint] = set()
        self._lacking: dict[Endpoint, str] = {}

    def able(self) -> set[Endpoint]:
        """Those that can."""
        self._look()
        return self._able

    def lacking(self) -> dict[Endpoint, str]:
        """Why the others cannot."""
        self._look()
        return self._lacking

    def _look(self) -> None:
        now = self._generation()
        if now == self._seen:
            return
        self._seen = now
        endpoints = [endpoint for pool in self._pools for endpoint in pool.endpoints]
        self._lacking = {endpoint: why for endpoint in endpoints if (why := self._hard(endpoint))}
        possible = [endpoint for endpoint in endpoints if endpoint not in self._lacking]
        spoken_against = {endpoint: why for endpoint in possible if (why := self._soft(endpoint))}
        if len(spoken_against) < len(possible):
            self._lacking |= spoken_against
        self._able = {endpoint for endpoint in possible if endpoint not in self._lacking}


class PoolPart:
    """A pool as one kind of call sees it: without the endpoints that cannot do it."""

    def __init__(self, pool: PoolLike, fit: Fit) -> None:
        self.name = pool.name
        self.service = pool.service
        self.hardware = pool.hardware
        self._pool = pool
        self._fit = fit

    @property
    def endpoints(self) -> list[Endpoint]:
        """Those that can."""
        able = self._fit.able()
        return [endpoint for endpoint in self._pool.endpoints if endpoint in able]

    def count(self, state: State) -> int:
        """Of those, how many are in that state."""
        return sum(endpoint.state is state for endpoint in self.endpoints)

    def describe(self) -> str:
        """For people, with the reasons of those that cannot."""
        lacking = self._fit.lacking()
        reasons = [f"{e.address}: {lacking[e]}" for e in self._pool.endpoints if e in lacking]
        shown = "; ".join([*reasons[:3], *([f"and {len(reasons) - 3} more"] if len(reasons) > 3 else [])])
        return self._pool.describe() + (f" [{shown}]" if shown else "")


class Placing:
    """Answers for each call with the pools that may serve it. Made anew when the configuration changes.

    generation: counts the changes of endpoints.
    """

    def __init__(self, config: GatewayConfig, pools: Sequence[PoolLike], *, generation: Callable[[], int]) -> None:
        self._config = config
        self._pools = pools
        self._generation = generation
        self._kept: dict[tuple[object, ...], tuple[Tiers, Draw | None, Fit | None]] = {}
        self._draws: dict[int, Draw] = {}  # by the route's place in the file

    def tiers(self, asked: Asked, preference: Preference, *, home: str | None = None) -> Tiers:
        """The pools that may serve a call, in tiers of which each is tried before the next.

        home: the store that the operation is in which the call is about; None if any will do.

        Raises Fault: NOT_FOUND if the service has no pool; FAILED_PRECONDITION if only labels without a pool may serve
        (HARDWARE_NOT_AVAILABLE) or no endpoint meets what the call needs (REQUIREMENTS_NOT_MET).
        """
        about_operation = bool(asked.operation) and not asked.begins
        if about_operation:
            preference = NO_PREFERENCE  # it lives where it lives
        method = asked.method
        key = (
            method.path if method.known else method.label,
            method.service,
            asked.model,
            asked.tensorrt,
            preference,
            home,
        )
        found = self._kept.get(key)
        if found is None:
            if len(self._kept) >= _KEPT:
                self._kept.clear()
            found = self._kept[key] = self._place(asked, preference, home)
        tiers, draw, fit = found
        if fit is not None:
            self._require_any(tiers, fit, asked)
        return tiers if draw is None else draw.next(tiers)

    def reads_streams(self, service: str) -> bool:
        """Whether routes of that service look at models, so that a stream's first request has to be waited for."""
        return any(route.service == service and route.models for route in self._config.routes)

    def _place(self, asked: Asked, preference: Preference, home: str | None) -> tuple[Tiers, Draw | None, Fit | None]:
        service = asked.method.service
        pools = [pool for pool in self._pools if pool.service == service]
        if not pools:
            raise faults.not_found("pool", service, sorted({pool.service for pool in self._pools}), field="service")
        number, route = find_route(self._config.routes, asked)
        labels = self._labels(pools, route, asked, preference)
        tiers: Tiers = tuple(tier for label in labels if (tier := tuple(p for p in pools if p.hardware == label)))
        if not tiers:
            raise _no_label(asked, preference, route, pools)
        fit: Fit | None = None
        needs = route.needs if route is not None else None
        if asked.model or needs is not None or asked.tensorrt or home is not None:
            fit = Fit(
                [pool for tier in tiers for pool in tier],
                hard=lambda endpoint: _hard(endpoint, asked, route, home),
                soft=lambda endpoint: _soft(endpoint, asked),
                generation=self._generation,
            )
            tiers = tuple(tuple(PoolPart(pool, fit) for pool in tier) for tier in tiers)
        draw: Draw | None = None
        if route is not None and route.weights:
            # Calls of one route share the counting, whatever their model: the share is the route's.
            draw = self._draws.setdefault(number, Draw(route.weights))
        return tiers, draw, fit if needs is not None or asked.tensorrt else None

    def _labels(
        self, pools: Sequence[PoolLike], route: RouteConfig | None, asked: Asked, preference: Preference
    ) -> tuple[str, ...]:
        policy = (*route.prefer, *route.only) if route is not None else ()
        default = dict.fromkeys(
            [*policy, *self._config.defaults.get(asked.method.service, ()), *(pool.hardware for pool in pools)]
        )
        labels = preference.order(default)
        if route is not None and route.only:
            labels = tuple(label for label in labels if label in route.only)
        if asked.tensorrt:
            labels = tuple(label for label in labels if label in _TENSORRT_LABELS)
        return labels

    @staticmethod
    def _require_any(tiers: Tiers, fit: Fit, asked: Asked) -> None:
        # As long as an endpoint has not reported, or a pool is at zero, one that can may still come.
        lacking = fit.lacking()
        if fit.able() or not lacking or any(endpoint.report is None for endpoint in lacking):
            return
        described = "; ".join(pool.describe() for tier in tiers for pool in tier)
        what = f"model {asked.model}" if asked.model else "this call"
        raise faults.failed_precondition(
            "REQUIREMENTS_NOT_MET",
            f"no endpoint has what {what} needs: {described}",
            service=asked.method.service,
            model=asked.model,
        )


def _hard(endpoint: Endpoint, asked: Asked, route: RouteConfig | None, home: str | None) -> str:
    if home is not None and endpoint.store != home:
        return "the operation is kept elsewhere"
    if asked.tensorrt and endpoint.report is not None and "tensorrt" not in endpoint.report.runtimes:
        return "it cannot build for TensorRT"
    if route is not None and route.needs is not None:
        return route.needs.why_not(endpoint.report)
    return ""


def _soft(endpoint: Endpoint, asked: Asked) -> str:
    if not asked.model:
        return ""
    if asked.model in endpoint.too_large:
        return f"model {asked.model} is too large for it"
    report = endpoint.report
    if report is not None and report.models and not any(model.name == asked.model for model in report.models):
        return f"it knows no model {asked.model}"
    return ""


def _no_label(
    asked: Asked, preference: Preference, route: RouteConfig | None, pools: Sequence[PoolLike]
) -> faults.Fault:
    service = asked.method.service
    here = ", ".join(dict.fromkeys(pool.hardware for pool in pools))
    if preference.strict:
        why = f"metadata.inkwell-hardware asks for nothing but {', '.join(preference.labels)}"
    elif asked.tensorrt:
        why = "TensorRT engines are built on cuda alone"
    else:
        why = "the gateway's configuration allows no other"
    if preference.strict and asked.tensorrt:
        why += ", and TensorRT engines are built on cuda alone"
    elif preference.strict and route is not None and route.only:
        why += f", and the gateway's configuration sends this call to {', '.join(route.only)} only"
    return faults.failed_precondition(
        "HARDWARE_NOT_AVAILABLE",
        f"{why}, and no pool of {service} has that; here are: {here}",
        service=service,
        available=here,
    )
