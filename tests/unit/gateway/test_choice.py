"""Which endpoint a call gets: tiers of hardware first, then load, then turn."""

import json
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway import config, preference
from services.gateway.asked import Asked
from services.gateway.ejection import EjectionRules, Record
from services.gateway.endpoint import State
from services.gateway.methods import METHODS
from services.gateway.pools import Fleet, none_ready
from services.kit.faults import Fault, Kind

RECOGNIZE = Asked(METHODS["/inkwell.ocr.v1.OcrService/Recognize"])


@dataclass(eq=False)
class Standing:
    """Stands for an endpoint where only the choice matters."""

    state: State
    in_flight: int
    tier: str
    turn: int = 0
    load: None = None
    reporting: bool = False
    heard_at: float = -math.inf
    ready_at: float = -math.inf
    record: Record = field(default_factory=lambda: Record(EjectionRules()))


def fleet_of(*labels: str, service: str = "ocr", defaults: list[str] | None = None) -> Fleet:
    pools = [
        {"name": f"p{i}", "service": service, "hardware": label, "targets": [f"host:{i + 1}"]}
        for i, label in enumerate(labels)
    ]
    text = json.dumps({"pools": pools, "defaults": {service: defaults} if defaults else {}})
    return Fleet(config.parse(text))


def order(fleet: Fleet, wanted: str | None) -> list[str]:
    asked = preference.NO_PREFERENCE if wanted is None else preference.parse(wanted)
    return [pool.hardware for tier in fleet.tiers(RECOGNIZE, asked) for pool in tier]


@pytest.mark.parametrize(
    ("defaults", "wanted", "expected"),
    [
        (None, None, ["cpu", "cuda", "rocm"]),
        (["cuda", "rocm"], None, ["cuda", "rocm", "cpu"]),
        (["xpu", "rocm"], None, ["rocm", "cpu", "cuda"]),
        (None, "rocm", ["rocm", "cpu", "cuda"]),
        (["cuda", "rocm", "cpu"], "cpu", ["cpu", "cuda", "rocm"]),
        (None, "cuda!", ["cuda"]),
        (None, "mps, rocm!", ["rocm"]),
        (None, "mps", ["cpu", "cuda", "rocm"]),
    ],
)
def test_order_of_hardware(defaults: list[str] | None, wanted: str | None, expected: list[str]) -> None:
    assert order(fleet_of("cpu", "cuda", "rocm", defaults=defaults), wanted) == expected


def test_strictly_wanted_hardware_that_no_pool_has_names_what_there_is() -> None:
    with pytest.raises(Fault) as refused:
        order(fleet_of("cpu", "rocm"), "cuda!")
    assert refused.value.data.kind is Kind.FAILED_PRECONDITION
    assert "here are: cpu, rocm" in refused.value.data.message


def test_a_service_without_pools_is_not_found() -> None:
    with pytest.raises(Fault) as refused:
        fleet_of("cpu", service="diffusion").tiers(RECOGNIZE, preference.NO_PREFERENCE)
    assert refused.value.data.kind is Kind.NOT_FOUND
    assert "diffusion" in refused.value.data.message


def test_nothing_ready_says_how_the_pools_stand_and_when_to_come_back() -> None:
    fleet = fleet_of("cpu", "cuda")
    fill(fleet, [[State.UNREACHABLE, State.UNREACHABLE], [State.NOT_READY]])
    tiers = fleet.tiers(RECOGNIZE, preference.NO_PREFERENCE)
    assert fleet.choose(tiers) is None
    fault = none_ready(tiers)
    assert "p0 (2 unreachable); p1 (1 not_ready)" in fault.data.message
    assert fault.data.retry_after_ms == 1000


def fill(fleet: Fleet, states: list[list[State]], loads: list[int] | None = None) -> list[Any]:
    made: list[Any] = []
    for pool, listed in zip(fleet.pools, states, strict=True):
        for state in listed:
            load = loads[len(made)] if loads else 0
            made.append(Standing(state, load, pool.name))
        pool.endpoints = made[-len(listed) :] if listed else []
    return made


states = st.lists(st.lists(st.sampled_from(State), max_size=4), min_size=3, max_size=3)


@given(states=states, loads=st.lists(st.integers(0, 5), min_size=12, max_size=12), data=st.data())
def test_the_best_tier_with_a_ready_untried_endpoint_gives_its_least_loaded(
    states: list[list[State]], loads: list[int], data: st.DataObject
) -> None:
    fleet = fleet_of("cuda", "rocm", "cpu")
    made = fill(fleet, states, loads)
    tried = data.draw(st.lists(st.sampled_from(made), max_size=3)) if made else []
    chosen: Any = fleet.choose(fleet.tiers(RECOGNIZE, preference.NO_PREFERENCE), tried)
    able = [e for e in made if e.state is State.READY and e not in tried]
    if not able:
        assert chosen is None
        return
    first_tier = min(e.tier for e in able)
    assert chosen.tier == first_tier
    assert chosen.in_flight == min(e.in_flight for e in able if e.tier == first_tier)


@given(count=st.integers(1, 5), calls=st.integers(0, 40))
def test_idle_endpoints_take_turns(count: int, calls: int) -> None:
    fleet = fleet_of("cpu")
    made = fill(fleet, [[State.READY] * count])
    tiers = fleet.tiers(RECOGNIZE, preference.NO_PREFERENCE)
    taken = {id(e): 0 for e in made}
    for _ in range(calls):
        chosen: Any = fleet.choose(tiers)
        chosen.turn = fleet.next_turn()
        taken[id(chosen)] += 1
    assert max(taken.values()) - min(taken.values()) <= 1
