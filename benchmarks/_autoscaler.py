"""The rules by which KEDA and the Horizontal Pod Autoscaler change a pool, and a pool that is changed by them.

The rules are Kubernetes' own (kubernetes.io, "Horizontal Pod Autoscaling", algorithm details and configurable scaling
behavior) and KEDA's for going from zero and to it (keda.sh, "Scaling Deployments"). Times are seconds.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

# The autoscaler's rhythm and its disregard of small differences: flags of kube-controller-manager, at their defaults.
SYNC_S = 15
TOLERANCE = 0.1
# The gateways are read every 15 s and the rules are evaluated every 15 s: what an autoscaler sees is so old at most.
SEEN_LATE_S = 30


@dataclass(frozen=True)
class Policy:
    """How many pods, or what share of them in percent, may come or go within a time."""

    kind: str  # "Pods" or "Percent"
    value: int
    period_s: int


@dataclass(frozen=True)
class Rules:
    """What a ScaledObject or a HorizontalPodAutoscaler says of a pool.

    threshold: calls a pod. least 0 is for KEDA alone: then the pool goes from zero when there are more calls than
    `activation`, and back `cooldown_s` after there were.
    """

    least: int
    most: int
    threshold: float
    activation: float
    polling_s: int
    cooldown_s: int
    up_stable_s: int
    down_stable_s: int
    up: tuple[Policy, ...]
    down: tuple[Policy, ...]

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> "Rules":
        """Read a manifest; raises KeyError for a part that these rules cannot do without."""
        spec = manifest["spec"]
        if manifest["kind"] == "ScaledObject":
            (trigger,) = spec["triggers"]
            behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
            least, most = spec["minReplicaCount"], spec["maxReplicaCount"]
            threshold, activation = trigger["metadata"]["threshold"], trigger["metadata"]["activationThreshold"]
            polling, cooldown = spec["pollingInterval"], spec["cooldownPeriod"]
        else:
            (metric,) = spec["metrics"]
            behavior = spec["behavior"]
            least, most = spec["minReplicas"], spec["maxReplicas"]
            threshold, activation = metric["external"]["target"]["averageValue"], 0
            polling, cooldown = SYNC_S, 0

        def policies(way: str) -> tuple[Policy, ...]:
            return tuple(Policy(p["type"], p["value"], p["periodSeconds"]) for p in behavior[way]["policies"])

        return cls(
            least,
            most,
            float(threshold),
            float(activation),
            polling,
            cooldown,
            behavior["scaleUp"]["stabilizationWindowSeconds"],
            behavior["scaleDown"]["stabilizationWindowSeconds"],
            policies("scaleUp"),
            policies("scaleDown"),
        )


class Autoscaler:
    """Decides how many pods there should be, as time goes on."""

    def __init__(self, rules: Rules, replicas: int) -> None:
        self.rules = rules
        self.replicas = replicas
        self._said: deque[tuple[float, int]] = deque()  # when, and how many pods the load alone would have
        self._changes: deque[tuple[float, int]] = deque()  # when, and by how many
        self._active_at = 0.0

    def step(self, now: float, demand: float) -> int:
        """What it comes to, given the calls that wait or run. Asked once a second, in order."""
        rules = self.rules
        if now % rules.polling_s == 0:
            if demand > rules.activation:
                self._active_at = now
                if self.replicas == 0:
                    self._change(now, 1)
            elif rules.least == 0 and self.replicas and now - self._active_at >= rules.cooldown_s:
                self._change(now, 0)
        if now % SYNC_S == 0 and self.replicas:
            self._change(now, self._limited(now, self._stable(now, self._wanted(demand))))
        return self.replicas

    def _wanted(self, demand: float) -> int:
        ratio = demand / (self.rules.threshold * self.replicas)
        wanted = self.replicas if abs(ratio - 1) <= TOLERANCE else math.ceil(demand / self.rules.threshold)
        return min(max(wanted, self.rules.least, 1), self.rules.most)

    def _stable(self, now: float, wanted: int) -> int:
        # The lowest of late holds growth back, the highest of late holds shrinking back.
        self._said.append((now, wanted))
        while self._said[0][0] < now - max(self.rules.up_stable_s, self.rules.down_stable_s):
            self._said.popleft()
        up = min(count for when, count in self._said if when >= now - self.rules.up_stable_s)
        down = max(count for when, count in self._said if when >= now - self.rules.down_stable_s)
        return max(self.replicas, up) if up > self.replicas else min(self.replicas, down)

    def _limited(self, now: float, wanted: int) -> int:
        # Of several policies the one that changes most counts, as `selectPolicy` does unless it is set.
        if wanted > self.replicas:
            most = []
            for policy in self.rules.up:
                began = self.replicas - self._changed(now, policy.period_s, up=True)
                more = policy.value if policy.kind == "Pods" else math.ceil(began * policy.value / 100)
                most.append(began + more)
            return max(self.replicas, min(wanted, max(most, default=wanted)))
        if wanted < self.replicas:
            least = []
            for policy in self.rules.down:
                began = self.replicas + self._changed(now, policy.period_s, up=False)
                fewer = policy.value if policy.kind == "Pods" else math.floor(began * policy.value / 100)
                least.append(began - fewer)
            return min(self.replicas, max(wanted, min(least, default=wanted)))
        return wanted

    def _changed(self, now: float, period_s: int, *, up: bool) -> int:
        return sum(abs(by) for when, by in self._changes if when > now - period_s and (by > 0) == up)

    def _change(self, now: float, replicas: int) -> None:
        if replicas != self.replicas:
            self._changes.append((now, replicas - self.replicas))
            self.replicas = replicas
        while self._changes and self._changes[0][0] < now - 3600:
            self._changes.popleft()


@dataclass(frozen=True)
class Pod:
    """What one pod does. calls_s: calls a second when it is busy. alone_s: what a call takes with nobody beside it.

    Between the two, n calls in it end at n / (alone_s + n / calls_s) a second: each takes its own time and what the
    others take from it. start_s: from being wanted to being ready: a node, the image, the model.
    """

    calls_s: float
    alone_s: float
    start_s: int


@dataclass(frozen=True)
class Course:
    """What came of a day, by second. waits_s: of each call, beyond the time that it takes alone."""

    demand: np.ndarray
    ready: np.ndarray
    wanted: np.ndarray
    waits_s: np.ndarray

    @property
    def pod_hours(self) -> float:
        """Hours that pods were there, starting ones included."""
        return float(self.wanted.sum()) / 3600

    def share_within(self, seconds: float) -> float:
        """Of the calls, how many waited no longer."""
        return float((self.waits_s <= seconds).mean()) if len(self.waits_s) else 1.0


def simulate(arrivals: np.ndarray, pod: Pod, rules: Rules, *, replicas: int) -> Course:
    """Let a pool live through the calls that arrive in each second, first come first served.

    Calls are a fluid that spreads over the pods evenly. The autoscaler sees demand as late as rules and scrapes make
    it. Pods that are to go end at once; what they were doing is done by the others, as calls are retried.
    """
    scaler = Autoscaler(rules, replicas)
    seconds = len(arrivals)
    demand, ready, wanted = np.zeros(seconds), np.zeros(seconds), np.zeros(seconds)
    ended = np.zeros(seconds)
    starting: deque[int] = deque()  # when each pod that was added will be ready
    inside, serving = 0.0, replicas
    for now in range(seconds):
        while starting and starting[0] <= now:
            starting.popleft()
            serving += 1
        before, inside = inside, _inside_after(inside + arrivals[now], serving, pod)
        ended[now], demand[now], ready[now] = before + arrivals[now] - inside, inside, serving
        seen = demand[max(0, now - SEEN_LATE_S)] if now >= SEEN_LATE_S else inside
        target = scaler.step(now, seen)
        while serving + len(starting) < target:
            starting.append(now + pod.start_s)
        while serving + len(starting) > target:
            if starting:
                starting.pop()
            else:
                serving -= 1
        wanted[now] = target
    return Course(demand, ready, wanted, _waits(arrivals, ended, pod.alone_s))


def _inside_after(there: float, serving: int, pod: Pod) -> float:
    # Of the calls that are there, those that are still there a second later, if as many end as would with these left
    # (the backward Euler method, which holds where a call takes much less than a second).
    if serving == 0:
        return there
    share = 1 / (serving * pod.calls_s)
    half = (pod.alone_s + 1 - there * share) / 2
    return (math.sqrt(half * half + share * there * pod.alone_s) - half) / share


def _waits(arrivals: np.ndarray, ended: np.ndarray, alone_s: float) -> np.ndarray:
    # First come first served: a call ends when as many have ended as had come with it. Half a call less, for what is
    # left of a fluid never ends quite.
    come, gone = np.cumsum(arrivals) - 0.5, np.cumsum(ended)
    seconds = np.flatnonzero(arrivals)
    # The last ones may be there still when the day ends.
    ends = np.interp(come[seconds], gone, np.arange(len(gone)), right=float(len(gone)))
    return np.repeat(np.maximum(0.0, ends - seconds - alone_s), arrivals[seconds])
