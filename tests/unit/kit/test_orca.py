"""Load reports on the wire."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.kit import orca
from services.kit.admission import Admission, Priority
from tests.support.clock import Clock

# Made with the classes of xds-protos 1.85.0: an OrcaLoadReport with cpu 0.5, memory 0.25, rps_fractional 2, eps 1,
# application_utilization 0.75 and the named metric inkwell.slots 4; and an OrcaLoadReportRequest for every 1.5 s.
THEIR_REPORT = bytes.fromhex(
    "09000000000000e03f11000000000000d03f31000000000000004039000000000000f03f"
    "42180a0d696e6b77656c6c2e736c6f747311000000000000104049000000000000e83f"
)
THEIR_REQUEST = bytes.fromhex("0a0808011080cab5ee01")

loads = st.builds(
    orca.Load,
    slots=st.integers(1, 10_000),
    running=st.integers(0, 10_000),
    waiting=st.integers(0, 10_000),
    wait_s=st.floats(0, 1e6),
    call_s=st.floats(0, 1e6),
)


def test_the_messages_are_those_of_everybody_else() -> None:
    report = orca._Report.FromString(THEIR_REPORT)
    assert (report.cpu_utilization, report.mem_utilization, report.rps_fractional, report.eps) == (0.5, 0.25, 2, 1)
    assert (report.application_utilization, dict(report.named_metrics)) == (0.75, {"inkwell.slots": 4})
    assert report.SerializeToString(deterministic=True) == THEIR_REPORT
    assert orca.request(1.5) == THEIR_REQUEST


@given(loads)
def test_a_load_arrives_as_it_was_sent(load: orca.Load) -> None:
    assert orca.decode(orca.encode(load)) == load


def test_others_see_how_full_it_is() -> None:
    report = orca._Report.FromString(orca.encode(orca.Load(slots=4, running=4, waiting=2, wait_s=3, call_s=2)))
    assert report.application_utilization == 1.5


@given(st.binary(max_size=200))
def test_what_is_no_report_of_ours_is_none(data: bytes) -> None:
    load = orca.decode(data)
    assert load is None or load.slots >= 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 1e300])
def test_a_report_of_impossible_values_is_none(value: float) -> None:
    assert orca.decode(THEIR_REPORT) is None  # some of our values are missing
    assert orca.decode(orca.encode(orca.Load(1, 0, 0, value, 1.0))) is None
    assert orca.decode(orca.encode(orca.Load(1, 0, 0, 1.0, value))) is None


def test_the_load_of_a_queue() -> None:
    clock = Clock()
    admission = Admission(slots=2, queue_limit=10, queue_bytes_limit=1000, clock=clock)
    assert orca.load_of(admission) == orca.Load(2, 0, 0, 0, 0)

    def enter(cost: float) -> None:
        ticket = admission.enter(priority=Priority.NORMAL, cost=cost, time_left_s=None)
        admission.make_eligible(ticket, 1)
        granted = admission.grant_next()
        if granted is not None:
            tickets.append(granted)

    tickets: list = []  # type: ignore[type-arg]
    enter(2.0)
    clock.now += 4
    admission.leave(tickets.pop(), completed=True)
    assert orca.load_of(admission) == orca.Load(2, 0, 0, 0, 4)  # 2 s for a unit of cost, 4 s for a call

    enter(1.0)
    assert orca.load_of(admission) == orca.Load(2, 1, 0, 0, 4)  # a slot is free: no wait
    enter(1.0)
    enter(3.0)
    # 3 that wait and half of the 2 that run, at 2 s each, by two slots.
    assert orca.load_of(admission) == orca.Load(2, 2, 1, 4, 4)
