"""The network policies let through every call of the design, and none besides."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from tests.k8s.rendered import Build, Object, labels_of, matches, name_of, of_kind, ports_of, rendered, workloads

GRPC = {"gateway": 50050, "ocr": 50051, "diffusion": 50052, "compiler": 50053}
METRICS, DNS, HTTPS, API_SERVER, POSTGRES, COLLECTOR, SOME_PORT = 9464, 53, 443, 6443, 5432, 4317, 31234
PORTS = (*GRPC.values(), METRICS, DNS, HTTPS, API_SERVER, POSTGRES, COLLECTOR, SOME_PORT, 29500, 50059)


@dataclass(frozen=True)
class Place:
    """Somebody who may connect, or be connected to. ports: by name. within: of the namespace with the policies."""

    name: str
    labels: dict[str, str] = field(hash=False)
    namespace: dict[str, str] = field(hash=False)
    ports: dict[str, int] = field(default_factory=dict, hash=False)
    within: bool = False


OURS = {"kubernetes.io/metadata.name": "inkwell"}
CLIENT = Place("client", {}, {"inkwell.dev/client": "true"})
STRANGER = Place("stranger", {}, {"kubernetes.io/metadata.name": "default"})
STRANGER_POD = Place("stranger-pod", {"app": "other"}, OURS, within=True)
MONITORING = Place("monitoring", {}, {"kubernetes.io/metadata.name": "monitoring"})
NAMES = Place("dns", {"k8s-app": "kube-dns"}, {"kubernetes.io/metadata.name": "kube-system"})
SYSTEM = Place("system", {"k8s-app": "other"}, {"kubernetes.io/metadata.name": "kube-system"})
# Whatever has no name in a policy: other clusters, the internet.
WORLD = Place("world", {}, {})
OTHERS = (CLIENT, STRANGER, STRANGER_POD, MONITORING, NAMES, SYSTEM, WORLD)


def _peer(peer: Object, place: Place) -> bool:
    namespaces = peer.get("namespaceSelector")
    same = place.within if namespaces is None else matches(namespaces, place.namespace)
    return same and matches(peer.get("podSelector", {}), place.labels)


def _allows(rules: list[Object], peers: str, place: Place, target: Place, port: int) -> bool:
    """Whether a rule has `place` among its peers, and the port of `target`.

    A rule without peers is for all; of others' pods it does not count, which have policies of their own.
    """
    for rule in rules:
        ports = rule.get("ports")
        numbers = None if ports is None else {target.ports.get(p["port"], p["port"]) for p in ports}
        if numbers is not None and port not in numbers:
            continue
        if peers not in rule:
            if place is WORLD or place.within:
                return True
        elif place is not WORLD and any(_peer(peer, place) for peer in rule[peers]):
            return True
    return False


def _open(policies: list[Object], source: Place, target: Place, port: int) -> bool:
    for place, kind, peers, other in ((source, "Egress", "to", target), (target, "Ingress", "from", source)):
        if not place.within:
            continue
        own = [
            policy["spec"]
            for policy in policies
            if kind in policy["spec"]["policyTypes"] and matches(policy["spec"]["podSelector"], place.labels)
        ]
        if own and not any(_allows(spec.get(kind.lower(), []), peers, other, target, port) for spec in own):
            return False
    return True


def _expected(build: Build, names: set[str], places: dict[str, Place]) -> Iterator[tuple[str, str, int]]:
    """Every call of the design between these."""
    have = build.components
    for service in names & GRPC.keys():
        if service == "gateway":
            yield "client", "gateway", GRPC["gateway"]
        else:
            yield "gateway", service, GRPC[service]
        yield "monitoring", service, METRICS
    # The endpoints of the pools.
    yield from (("gateway", "world", port) for port in (HTTPS, API_SERVER))
    if "s3" in have:
        for name in names & {"ocr", "diffusion", "compiler", "tensorrt-build"}:
            yield name, "world", HTTPS
            yield name, "dns", DNS
    if "postgres" in have:
        yield "compiler", "world", POSTGRES
        yield "compiler", "dns", DNS
    if "tracing" in have:
        for name in names & GRPC.keys():
            yield name, "monitoring", COLLECTOR
            yield name, "dns", DNS
    if "finetune" in have:
        yield from (("finetune", "finetune", port) for port in PORTS)
        yield "finetune", "dns", DNS


def _components(build: Build) -> Build:
    if not build.overlay:
        return build
    found = frozenset({"s3", "postgres", "tracing"}) if build.overlay == "production" else frozenset[str]()
    return Build(components=found | {"network-policies"})


def test_calls_of_the_design_and_none_besides(build: Build, objects: tuple[Object, ...]) -> None:
    build = _components(build)
    if "network-policies" not in build.components:
        return
    policies = of_kind(objects, "NetworkPolicy")
    places = {place.name: place for place in OTHERS}
    pods = set()
    for workload in workloads(objects):
        labels = labels_of(workload)
        name = labels["app.kubernetes.io/name"]
        # All pools of a service are alike; each has to be.
        for other in (name, name_of(workload)):
            places[other] = Place(other, labels, OURS, ports_of(workload), within=True)
        pods |= {name, name_of(workload)}
    found = {
        (source.name, target.name, port)
        for source in places.values()
        for target in places.values()
        if source.name in pods or target.name in pods
        for port in PORTS
        if _open(policies, source, target, port)
    }
    by_name = {name: places[name].labels["app.kubernetes.io/name"] for name in pods}
    plain = {(by_name.get(source, source), by_name.get(target, target), port) for source, target, port in found}
    assert plain == set(_expected(build, set(by_name.values()), places))
    # What holds for one pool of a service holds for each.
    for name, service in by_name.items():
        mine = {(by_name.get(s, s), by_name.get(t, t), p) for s, t, p in found if name in (s, t)}
        assert mine == {call for call in plain if service in call[:2]}


def test_nobody_else_may_make_policies_wider() -> None:
    """Without the policies everything is open, so what is closed above is closed by them."""
    place = Place("a", {}, OURS, within=True)
    assert _open([], place, place, SOME_PORT)
    deny = {"spec": {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}}
    assert not _open([deny], place, place, SOME_PORT)


@pytest.mark.parametrize("overlay", ["laptop", "nvidia", "amd", "mixed", "production"])
def test_every_overlay_denies_by_default(overlay: str) -> None:
    policies = of_kind(rendered(Build(overlay=overlay)), "NetworkPolicy")
    assert any(policy["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} for policy in policies), (
        "nothing denies by default"
    )
