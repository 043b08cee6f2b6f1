"""`python -m services.gateway check FILE`: is this configuration right, and what will it do?"""

from collections.abc import Iterator
from pathlib import Path

import yaml

from services.gateway import access_file
from services.gateway import config as configuration
from services.gateway.access_file import AccessFile
from services.gateway.config import GatewayConfig
from services.gateway.methods import FULL_NAMES


def check(path: Path) -> list[str]:
    """Lines for people on what the file means, and on what in it has no effect. Raises ConfigError.

    An access file, which has the key `rules`, is told from a configuration.
    """
    if _has_rules(path):
        return _access(path, access_file.load(path))
    config = configuration.load(path)
    lines = [f"{path}: ok, {_count(len(config.pools), 'pool')}, {_count(len(config.routes), 'route')}"]
    lines += [f"  {line}" for line in _orders(config)]
    lines += [f"  warning: {line}" for line in _idle(config)]
    return lines


def _has_rules(path: Path) -> bool:
    try:
        data = yaml.safe_load(configuration.decode(configuration.read(path), path))
    except yaml.YAMLError:
        return False  # which the check of a configuration says better
    return isinstance(data, dict) and "rules" in data


def _access(path: Path, file: AccessFile) -> list[str]:
    counted = (_count(len(file.rules), "rule"), _count(len(file.tokens), "issuer"), _count(len(file.keys), "key"))
    lines = [f"{path}: ok, {', '.join(counted)}"]
    for i, rule in enumerate(file.rules):
        bounds = (("models", rule.models), ("in pools", rule.pools), ("at most", rule.limits))
        told = "".join(f", {what} {' '.join(values)}" for what, values in bounds if values)
        lines.append(f"  rules[{i}]: {' '.join(rule.callers)} may call {' '.join(rule.methods)}{told}")
    for i, issuer in enumerate(file.tokens):
        if "://" not in issuer.keys and not (path.parent / issuer.keys).is_file():
            lines.append(f"  warning: tokens[{i}].keys: there is no file {path.parent / issuer.keys}")
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
