"""The model of the autoscalers, on cases that the documents of Kubernetes and KEDA work out."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks._autoscaler import SYNC_S, Autoscaler, Pod, Policy, Rules, simulate

RULES = Rules(
    least=1,
    most=20,
    threshold=10.0,
    activation=0.0,
    polling_s=15,
    cooldown_s=300,
    up_stable_s=0,
    down_stable_s=300,
    up=(),
    down=(),
)


def course(rules: Rules, demand: list[float], *, replicas: int = 1) -> list[int]:
    """Pods after each of the autoscaler's looks, 15 s apart, at so many calls each."""
    scaler = Autoscaler(rules, replicas)
    return [scaler.step(number * SYNC_S, calls) for number, calls in enumerate(demand)]


def test_there_are_as_many_as_the_calls_take() -> None:
    assert course(RULES, [25, 25, 200, 1000]) == [3, 3, 20, 20]


def test_a_tenth_more_or_less_changes_nothing() -> None:
    assert course(RULES, [21, 19, 23], replicas=2) == [2, 2, 3]


def test_it_shrinks_to_the_most_that_were_wanted_of_late() -> None:
    looks = RULES.down_stable_s // SYNC_S
    found = course(RULES, [50, *[10] * (looks + 2)], replicas=1)
    assert found[: looks + 1] == [5] * (looks + 1)
    assert found[looks + 1] == 1


def test_it_grows_to_the_fewest_that_were_wanted_of_late() -> None:
    rules = replace(RULES, up_stable_s=60)
    assert course(rules, [10, 50, 50, 50, 50, 50, 50]) == [1, 1, 1, 1, 1, 5, 5]


def test_of_several_policies_the_one_that_changes_most_counts() -> None:
    # The example of the documents: 4 pods or as many again, whichever is more.
    rules = replace(RULES, up=(Policy("Pods", 4, 15), Policy("Percent", 100, 15)))
    assert course(rules, [200] * 4) == [5, 10, 20, 20]


def test_a_policy_is_for_its_time() -> None:
    rules = replace(RULES, up=(Policy("Pods", 4, 60),))
    assert course(rules, [200] * 9) == [5, 5, 5, 5, 9, 9, 9, 9, 13]


def test_pods_leave_one_by_one() -> None:
    rules = replace(RULES, down_stable_s=0, down=(Policy("Pods", 1, 30),))
    assert course(rules, [0] * 6, replicas=4) == [3, 3, 2, 2, 1, 1]


def test_keda_wakes_a_pool_and_lets_it_sleep_when_nobody_has_called_for_long_enough() -> None:
    rules = replace(RULES, least=0, cooldown_s=60)
    found = course(rules, [0, 1, 0, 0, 0, 0, 0], replicas=0)
    assert found == [0, 1, 1, 1, 1, 0, 0]


def test_the_kept_activation_is_not_enough_to_wake_it() -> None:
    assert course(replace(RULES, least=0, activation=5.0), [5, 6], replicas=0) == [0, 1]


@pytest.mark.parametrize("kind", ["ScaledObject", "HorizontalPodAutoscaler"])
def test_rules_are_read_from_manifests(kind: str) -> None:
    behavior = {
        "scaleUp": {
            "stabilizationWindowSeconds": 0,
            "policies": [{"type": "Pods", "value": 4, "periodSeconds": 60}],
        },
        "scaleDown": {
            "stabilizationWindowSeconds": 300,
            "policies": [{"type": "Percent", "value": 10, "periodSeconds": 120}],
        },
    }
    manifests = {
        "ScaledObject": {
            "minReplicaCount": 0,
            "maxReplicaCount": 8,
            "pollingInterval": 15,
            "cooldownPeriod": 600,
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": behavior}},
            "triggers": [{"metadata": {"threshold": "32", "activationThreshold": "0"}}],
        },
        "HorizontalPodAutoscaler": {
            "minReplicas": 1,
            "maxReplicas": 8,
            "behavior": behavior,
            "metrics": [{"external": {"target": {"averageValue": "32"}}}],
        },
    }
    rules = Rules.of({"kind": kind, "spec": manifests[kind]})
    assert (rules.least, rules.most, rules.threshold) == (int(kind != "ScaledObject"), 8, 32)
    assert (rules.up, rules.down) == ((Policy("Pods", 4, 60),), (Policy("Percent", 10, 120),))
    assert rules.cooldown_s == (600 if kind == "ScaledObject" else 0)


# --- a pool under them ---

POD = Pod(calls_s=10.0, alone_s=0.5, start_s=60)


def test_a_pool_that_is_large_enough_makes_nobody_wait() -> None:
    found = simulate(np.full(600, 5), POD, replace(RULES, least=4, most=4), replicas=4)
    assert found.share_within(0.2) > 0.99  # the last ones are there at the end
    assert found.pod_hours == pytest.approx(4 * 600 / 3600)


def test_calls_inside_are_as_many_as_arrive_within_the_time_that_one_takes() -> None:
    # Little's law, with what a pod makes of n calls: n / (0.5 + n / 10) = 5 for n = 5.
    found = simulate(np.full(600, 5), POD, replace(RULES, most=1), replicas=1)
    assert found.demand[-1] == pytest.approx(5.0, rel=0.01)


def test_what_is_too_much_waits_until_pods_are_there() -> None:
    arrivals = np.full(1200, 30)
    found = simulate(arrivals, POD, RULES, replicas=1)
    assert found.ready[59] == 1  # pods take a minute
    assert found.ready.max() >= 4
    assert found.demand.max() > 20 * 60 * 0.9  # 30 a second came and 10 went, for a minute
    assert found.demand[-1] < 40
    assert len(found.waits_s) == arrivals.sum()
    assert found.waits_s.max() > 30


def test_the_first_call_of_a_pool_at_zero_waits_for_its_pod() -> None:
    arrivals = np.zeros(600, int)
    arrivals[90] = 1
    found = simulate(arrivals, POD, replace(RULES, least=0), replicas=0)
    (wait,) = found.waits_s
    # Until it is seen, and until the pod is ready.
    assert 60 <= wait <= 60 + 30 + 15 + 2
    assert found.wanted[:90].max() == 0
    assert found.wanted[-1] == 0  # and it sleeps again
