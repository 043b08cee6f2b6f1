"""`python -m services.gateway check FILE`: is this configuration right, and what will it do?"""

from collections.abc import Iterator
from pathlib import Path

from services.gateway import config as configuration
from services.gateway.config import GatewayConfig
from services.gateway.methods import FULL_NAMES


def check(path: Path) -> list[str]:
    """Lines for people on what the file means, and on what in it has no effect. Raises ConfigError."""
    config = configuration.load(path)
    lines = [f"{path}: ok, {_count(len(config.pools), 'pool')}, {_count(len(config.routes), 'route')}"]
    lines += [f"  {line}" for line in _orders(config)]
    lines += [f"  warning: {line}" for line in _idle(config)]
    return lines


def _orders(config: GatewayConfig) -> Iterator[str]:
    for service in FULL_NAMES:
        pools = [pool for pool in config.pools if pool.service == service]
        if not pools:
            yield f"{service}: no pool, calls are refused"
            continue
        labels = dict.fromkeys([*config.defaults.get(service, ()), *(pool.hardware for pool in pools)])
        tiers = {label: [pool.name for pool in pools if pool.hardware == label] for label in labels}
        yield f"{service}: " + ", then ".join(f"{label}: {' '.join(tiers[label])}" for label in labels if tiers[label])


def _idle(config: GatewayConfig) -> Iterator[str]:
    for i, route in enumerate(config.routes):
        where = f"routes[{i}]"
        labels = {pool.hardware for pool in config.pools if pool.service == route.service}
        if not labels:
            yield f"{where}: {route.service} has no pool"
            continue
        for key, listed in (("prefer", route.prefer), ("only", route.only)):
            for label in listed:
                if label not in labels:
                    yield f"{where}.{key}: no pool of {route.service} has hardware {label}"
        if route.only and not labels.intersection(route.only):
            yield f"{where}: every call that falls under it is refused"
        for j, before in enumerate(config.routes[:i]):
            if (
                before.service == route.service
                and (not before.methods or (route.methods and set(route.methods) <= set(before.methods)))
                and (not before.models or (route.models and set(route.models) <= set(before.models)))
            ):
                yield f"{where}: no call gets here, routes[{j}] takes them all"
                break
    for service, listed in config.defaults.items():
        for label in listed:
            if not any(pool.service == service and pool.hardware == label for pool in config.pools):
                yield f"defaults.{service}: no pool of {service} has hardware {label}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
