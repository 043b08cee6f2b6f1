"""A day of calls against the rules by which the manifests scale their pools: how long calls wait, and what it takes.

Nothing is served: the pool is a model of one (`_autoscaler.py`), with the rates that `pod_rate` measured. It answers
what the rules do with a day, not what a machine does. Needs `kubectl`, to read the rules from the manifests.
"""

import subprocess
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import yaml

from benchmarks._autoscaler import Course, Pod, Rules, simulate
from benchmarks._bars import Bar, at_least, at_most
from services.local import ROOT

DAY_S = 24 * 3600
SEED = 7
# The longest that a call may wait and still be well, besides its own time: of the objective `recognize-latency`.
WELL_S = 2.5


@dataclass(frozen=True)
class Scenario:
    """pools: folder with the manifests. peak: pods that the busiest hour keeps busy, the burst aside."""

    name: str
    pools: str
    scaled: str  # name of the ScaledObject or HorizontalPodAutoscaler
    pod: Pod
    peak: float


# One pod of handwriting-tiny on two cores (`pod_rate`); a card was not measured here, so that of a GPU pool is made up:
# ten times as fast, on nodes that have to be bought first.
CPU_POD = Pod(calls_s=27.0, alone_s=0.12, start_s=40)
GPU_POD = Pod(calls_s=270.0, alone_s=0.03, start_s=240)
SCENARIOS = (
    Scenario("cpu, KEDA", "cpu-keda", "ocr-cpu", CPU_POD, peak=5.0),
    Scenario("cpu, HPA", "cpu-hpa", "ocr-cpu", CPU_POD, peak=5.0),
    Scenario("GPU, KEDA, from zero", "cuda-keda", "ocr-cuda", GPU_POD, peak=5.0),
)


def day(peak_calls_s: float, *, seed: int = SEED) -> np.ndarray:
    """Calls that arrive in each second of a day.

    Nobody calls from midnight to six. Then it grows to a peak at eleven, dips at lunch, peaks again at half past three
    and fades until ten in the evening. At four in the afternoon somebody sends twice as much for five minutes. Arrivals
    are random (Poisson) around that.
    """
    hours = np.arange(DAY_S) / 3600
    shape = np.exp(-(((hours - 11) / 2.2) ** 2)) + np.exp(-(((hours - 15.5) / 2.5) ** 2))
    shape[(hours < 6) | (hours >= 22)] = 0
    rate = peak_calls_s * shape / shape.max()
    rate[(hours >= 16) & (hours < 16 + 5 / 60)] *= 2
    arrivals: np.ndarray = np.random.default_rng(seed).poisson(rate)
    return arrivals


def rules_of(folder: str, name: str) -> Rules:
    """The rules of a pool, as the manifests have them after all patches."""
    done = subprocess.run(
        ["kubectl", "kustomize", str(ROOT / "k8s" / "pools" / folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the manifests do not build: {done.stderr}")
    found: list[dict[str, Any]] = [
        item
        for item in yaml.safe_load_all(done.stdout)
        if item["kind"] in ("ScaledObject", "HorizontalPodAutoscaler") and item["metadata"]["name"] == name
    ]
    return Rules.of(found[0])


def show(name: str, course: Course, always: Course) -> None:
    """One line of the table."""
    waits = course.waits_s
    quantiles = " ".join(f"{np.quantile(waits, q):7.1f}" for q in (0.5, 0.95, 0.99, 1.0))
    at_zero = float((course.wanted == 0).mean()) * 24
    print(
        f"  {name:<22} {quantiles}  {course.share_within(WELL_S):7.2%} {int(course.wanted.max()):5d}"
        f" {at_zero:8.1f} {course.pod_hours:9.1f} {course.pod_hours / always.pod_hours:8.0%}"
    )


def run() -> dict[str, Bar]:
    """Print a table and answer the bars."""
    print(f"  {'':<22} {'wait, s: 50%':>12} {'95%':>3} {'99%':>7} {'most':>7} {'in time':>9} {'pods':>5}", end="")
    print(f" {'h at 0':>8} {'pod hours':>9} {'of peak':>8}")
    bars: dict[str, Bar] = {}
    for scenario in SCENARIOS:
        rules = rules_of(scenario.pools, scenario.scaled)
        arrivals = day(scenario.peak * scenario.pod.calls_s)
        # As many pods as the burst takes, all day.
        most = min(rules.most, int(np.ceil(2 * scenario.peak)))
        always = simulate(arrivals, scenario.pod, replace(rules, least=most, most=most), replicas=most)
        course = simulate(arrivals, scenario.pod, rules, replicas=rules.least)
        show(scenario.name, course, always)
        bars[f"{scenario.name}: share in time"] = at_least(course.share_within(WELL_S), 0.95)
        bars[f"{scenario.name}: pod hours of as many as the peak takes"] = at_most(
            course.pod_hours / always.pod_hours, 0.6
        )
    return bars
