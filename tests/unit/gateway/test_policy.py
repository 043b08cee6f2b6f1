"""Routes: which one a call falls under, what it does to the order of pools, and exact shares."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway import config, preference
from services.gateway.asked import Asked
from services.gateway.config import ConfigError
from services.gateway.methods import METHODS
from services.gateway.placing import Placing
from services.gateway.policy import Draw
from services.kit.faults import Fault, Kind

READ = METHODS["/inkwell.ocr.v1.OcrService/Recognize"]
EMBED = METHODS["/inkwell.ocr.v1.OcrService/Embed"]
COMPILE = METHODS["/inkwell.compiler.v1.CompilerService/Compile"]


@dataclass(frozen=True)
class Named:
    """Stands for a pool where only its place matters."""

    name: str
    service: str
    hardware: str
    endpoints: tuple[Any, ...] = ()


def placing(labels: list[str], *, service: str = "ocr", text: str = "") -> Placing:
    """Pools p0, p1 … with these labels, under the routes of `text`."""
    pools = "".join(
        f"  - {{name: p{i}, service: {service}, hardware: {label}, targets: ['h:{i + 1}']}}\n"
        for i, label in enumerate(labels)
    )
    parsed = config.parse(f"pools:\n{pools}{text}")
    there: list[Any] = [Named(pool.name, pool.service, pool.hardware) for pool in parsed.pools]
    return Placing(parsed, there, generation=lambda: 0)


def order(placing: Placing, asked: Asked, wanted: str | None = None) -> list[str]:
    preferred = preference.NO_PREFERENCE if wanted is None else preference.parse(wanted)
    return [pool.hardware for tier in placing.tiers(asked, preferred) for pool in tier]


ROUTES = """
defaults: {ocr: [rocm]}
routes:
  - {service: ocr, methods: [Recognize], models: ["large-*"], only: [cuda, rocm]}
  - {service: ocr, methods: [Embed], prefer: [cpu]}
  - {service: ocr, models: ["small"], prefer: [cuda]}
"""


@pytest.mark.parametrize(
    ("asked", "wanted", "expected"),
    [
        (Asked(READ), None, ["rocm", "cpu", "cuda"]),  # no route: defaults, then the order of the file
        (Asked(READ, "large-1"), None, ["cuda", "rocm"]),
        (Asked(READ, "large-1"), "rocm", ["rocm", "cuda"]),  # the caller orders what the route allows
        (Asked(READ, "large-1"), "cpu", ["cuda", "rocm"]),
        (Asked(EMBED, "large-1"), None, ["cpu", "rocm", "cuda"]),
        (Asked(EMBED, "small"), None, ["cpu", "rocm", "cuda"]),  # the first route decides
        (Asked(READ, "small"), None, ["cuda", "rocm", "cpu"]),
        (Asked(READ, "small"), "cpu", ["cpu", "cuda", "rocm"]),
        (Asked(READ, "small"), "cpu!", ["cpu"]),
    ],
)
def test_the_order_of_a_call(asked: Asked, wanted: str | None, expected: list[str]) -> None:
    assert order(placing(["cpu", "cuda", "rocm"], text=ROUTES), asked, wanted) == expected


def test_a_strict_caller_and_a_strict_route_that_do_not_meet_are_refused_with_both() -> None:
    with pytest.raises(Fault) as refused:
        order(placing(["cpu", "cuda"], text=ROUTES), Asked(READ, "large-1"), "cpu!")
    assert refused.value.data.kind is Kind.FAILED_PRECONDITION
    assert "nothing but cpu" in refused.value.data.message
    assert "to cuda, rocm only" in refused.value.data.message


def test_compiling_for_tensorrt_goes_to_cuda_by_itself() -> None:
    compilers = placing(["cpu", "cuda"], service="compiler")
    assert order(compilers, Asked(COMPILE, begins=True)) == ["cpu", "cuda"]
    assert order(compilers, Asked(COMPILE, begins=True, tensorrt=True)) == ["cuda"]
    assert order(compilers, Asked(COMPILE, begins=True, tensorrt=True), "cpu") == ["cuda"]
    with pytest.raises(Fault, match="TensorRT engines are built on cuda alone"):
        order(compilers, Asked(COMPILE, begins=True, tensorrt=True), "cpu!")
    with pytest.raises(Fault, match="TensorRT engines are built on cuda alone.*here are: cpu"):
        order(placing(["cpu"], service="compiler"), Asked(COMPILE, begins=True, tensorrt=True))


def test_a_canary_has_exactly_its_share_and_the_others_stand_behind_it() -> None:
    text = "routes:\n  - {service: ocr, weights: {p0: 95, p1: 5, p2: 0}}\n"
    placed = placing(["cuda", "cuda", "cuda", "cpu"], text=text)
    taken: Counter[str] = Counter()
    for _ in range(200):
        first, *rest = placed.tiers(Asked(READ), preference.NO_PREFERENCE)
        taken[first[0].name] += 1
        other = "p1" if first[0].name == "p0" else "p0"
        assert [[pool.name for pool in tier] for tier in rest] == [[other], ["p3"]]
    assert taken == {"p0": 190, "p1": 10}


@given(weights=st.lists(st.integers(1, 20), min_size=2, max_size=5), rounds=st.integers(1, 3))
def test_shares_are_exact_and_spread(weights: list[int], rounds: int) -> None:
    draw = Draw({f"p{i}": weight for i, weight in enumerate(weights)})
    tier: Any = tuple(Named(f"p{i}", "ocr", "cuda") for i in range(len(weights)))
    total = sum(weights)
    names = [draw.next((tier,))[0][0].name for _ in range(total * rounds)]
    assert Counter(names) == {f"p{i}": weight * rounds for i, weight in enumerate(weights)}
    for i, weight in enumerate(weights):
        # Never far from its share: after any number of calls less than the number of pools away.
        given_so_far = 0
        for calls, name in enumerate(names, 1):
            given_so_far += name == f"p{i}"
            assert abs(given_so_far - calls * weight / total) < len(weights)


@pytest.mark.parametrize(
    ("route", "expected"),
    [
        (
            "{service: ocr, methods: [Read]}",
            "routes[0]: 'Read' is not a method of ocr; accepted: BatchRecognize, Embed",
        ),
        ("{service: ocr, prefer: [gpu]}", "routes[0].prefer[0]: 'gpu' is not a hardware label; accepted: cuda"),
        ("{service: ocr, prefer: [cpu], only: [cpu]}", "routes[0]: it has both 'prefer' and 'only'"),
        ("{service: ocr, needs: {}}", "routes[0].needs: it is empty; accepted: one or more of memory_gib"),
        ("{service: ocr, needs: {memory: 3}}", "routes[0].needs.memory: there is no such key"),
        ("{service: ocr, weights: {p9: 1}}", "routes[0].weights: ocr has no pool 'p9'; accepted: p0, p1"),
        ("{service: ocr, weights: {p0: 1}}", "routes[0].weights: 'p1' is missing; of a hardware label, here cuda"),
        ("{service: ocr, weights: {p0: 0, p1: 0}}", "routes[0].weights: all pools of cuda have weight 0"),
        ("{service: ocr, weights: {p0: -1, p1: 1}}", "routes[0].weights.p0: input should be greater than"),
        ("{methods: [Embed]}", "routes[0].service: this key is required"),
    ],
)
def test_a_wrong_route_is_named_with_what_is_accepted(route: str, expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        placing(["cuda", "cuda"], text=f"routes:\n  - {route}\n")
    assert expected in str(refused.value)


def test_pools_may_share_a_target_only_if_both_select() -> None:
    shared = """
pools:
  - {name: big, service: ocr, hardware: cuda, targets: ["dns:///ocr:1"], select: {memory_gib: 40}}
  - {name: rest, service: ocr, hardware: cuda, targets: ["dns:///ocr:1"], select: {memory_gib: 1}}
"""
    assert len(config.parse(shared).pools) == 2
    with pytest.raises(ConfigError, match="is already in pool 'big'; pools may share a target if each has 'select'"):
        config.parse(shared.replace(", select: {memory_gib: 1}", ""))
