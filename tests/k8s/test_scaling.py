"""Pools grow and shrink by the calls that wait for them and run in them."""

import re

import pytest
import yaml

from tests.k8s.rendered import K8S, Build, Object, labels_of, name_of, of_kind, rendered

QUERY = re.compile(r'sum\((?P<rule>[a-z_:]+)\{namespace="(?P<namespace>[a-z-]+)", pool="(?P<pool>[a-z-]+)"\}\)')


def _rules() -> set[str]:
    """Names of the recording rules that the component `monitoring` brings."""
    groups = [
        group
        for path in (K8S / "components" / "monitoring" / "rules").glob("*.yaml")
        for group in yaml.safe_load(path.read_text("utf-8"))["spec"]["groups"]
    ]
    return {rule["record"] for group in groups for rule in group["rules"] if "record" in rule}


def _scalers(objects: tuple[Object, ...]) -> dict[str, Object]:
    """By the name of what they scale."""
    found = of_kind(objects, "ScaledObject", "HorizontalPodAutoscaler")
    by_target = {item["spec"]["scaleTargetRef"]["name"]: item for item in found}
    assert len(by_target) == len(found)
    return by_target


def test_each_scaler_has_a_deployment_that_leaves_the_number_to_it(objects: tuple[Object, ...]) -> None:
    deployments = {name_of(item): item for item in of_kind(objects, "Deployment")}
    for target, scaler in _scalers(objects).items():
        assert "replicas" not in deployments[target]["spec"]
        assert name_of(scaler) == target


def test_keda_asks_for_the_pool_itself(objects: tuple[Object, ...]) -> None:
    for target, scaler in _scalers(objects).items():
        if scaler["kind"] != "ScaledObject":
            continue
        spec = scaler["spec"]
        (trigger,) = spec["triggers"]
        asked = QUERY.fullmatch(trigger["metadata"]["query"])
        assert asked is not None
        assert (asked["pool"], asked["namespace"]) == (target, scaler["metadata"]["namespace"])
        assert asked["rule"] in _rules()
        # No data is a fault of the monitoring, not a pool without calls: what is there stays.
        assert trigger["metadata"]["ignoreNullValues"] == "false"
        assert spec["fallback"]["replicas"] >= 1
        assert trigger["metadata"]["activationThreshold"] == "0"
        deployment = next(item for item in of_kind(objects, "Deployment") if name_of(item) == target)
        gpu = labels_of(deployment)["inkwell.dev/hardware"] != "cpu"
        assert spec["minReplicaCount"] == (0 if gpu else 1)
        assert spec["maxReplicaCount"] > 1


def test_the_hpa_asks_for_the_pool_itself(objects: tuple[Object, ...]) -> None:
    for target, scaler in _scalers(objects).items():
        if scaler["kind"] != "HorizontalPodAutoscaler" or target == "gateway":
            continue
        (metric,) = scaler["spec"]["metrics"]
        assert metric["external"]["metric"] == {
            "name": "inkwell_pool_demand",
            "selector": {"matchLabels": {"pool": target}},
        }
        assert scaler["spec"]["minReplicas"] == 1


def test_there_are_two_gateways_at_least_where_they_are_scaled(objects: tuple[Object, ...]) -> None:
    scaler = _scalers(objects).get("gateway")
    assert scaler is None or scaler["spec"]["minReplicas"] == 2


@pytest.mark.parametrize("scaling", ["hpa", "keda"])
def test_every_pool_that_answers_calls_is_scaled(scaling: str) -> None:
    objects = rendered(Build(pools=tuple(f"{hardware}-{scaling}" for hardware in ("cuda", "rocm", "cpu"))))
    pools = {f"{service}-{hardware}" for service in ("ocr", "diffusion") for hardware in ("cuda", "rocm", "cpu")}
    assert _scalers(objects).keys() == pools
