"""Whose trace a call belongs to, and what is asked of a machine that cannot record any."""

import subprocess
import sys

import pytest

from services.kit import phases, tracing
from services.kit.settings import ServiceSettings
from services.kit.tracing import Parent, TracingMissingError

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    ("value", "recorded"),
    [
        (f"00-{TRACE}-{SPAN}-01", True),
        (f"00-{TRACE}-{SPAN}-00", False),
        (f"00-{TRACE}-{SPAN}-03", True),  # other flags are other matters
        (f"cc-{TRACE}-{SPAN}-01-what will be", True),  # a later version
    ],
)
def test_a_traceparent_says_whose_trace_it_is(value: str, recorded: bool) -> None:
    assert Parent.read(value) == Parent(TRACE, SPAN, recorded)


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"00",
        "",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-01-more",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE[1:]}-{SPAN}-01",
    ],
)
def test_what_is_no_traceparent_counts_for_nothing(value: object) -> None:
    assert Parent.read(value) is None


def test_an_endpoint_without_the_libraries_is_refused_and_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    assert tracing.start("test", ServiceSettings()) is None
    with pytest.raises(TracingMissingError, match=r"pip install 'inkwell\[tracing\]'"):
        tracing.start("test", ServiceSettings(trace_endpoint="http://127.0.0.1:4317"))


def test_a_service_that_records_nothing_imports_nothing_for_it() -> None:
    loads = "import sys, services.gateway.__main__, services.ocr.__main__, services.kit.operations"
    said = "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    done = subprocess.run([sys.executable, "-c", f"{loads}; {said}"], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_outside_of_a_call_there_is_no_trace() -> None:
    assert (tracing.current(), tracing.current_trace_id(), tracing.traceparent()) == (None, "", "")


def test_phases_follow_each_other_without_gaps() -> None:
    phases.follow("a")
    phases.enter("a", "encode", batch_size=4)
    phases.enter("a", "encode", batch_size=4)  # it is in it already
    phases.enter("a", "decode")
    for _ in range(200):
        phases.step("a")
    wait, encode, decode = phases.take("a")
    assert [phase.name for phase in (wait, encode, decode)] == ["wait", "encode", "decode"]
    assert wait.ended_ns == encode.began_ns
    assert encode.ended_ns == decode.began_ns <= decode.steps[0].at_ns <= decode.ended_ns
    assert encode.attributes == {"batch_size": 4}
    assert decode.attributes == {"steps": 200}
    assert len(decode.steps) == 128
    assert phases.take("a") == ()


def test_an_engine_that_says_nothing_of_its_phases_waits_and_computes() -> None:
    phases.follow("a")
    phases.accepted("a")
    assert [phase.name for phase in phases.take("a")] == ["wait", "compute"]
    phases.follow("a")
    phases.enter("a", "batch")
    phases.accepted("a")  # told when it had already begun
    assert [phase.name for phase in phases.take("a")] == ["wait", "batch"]


def test_of_a_job_that_nobody_follows_nothing_is_noted() -> None:
    phases.enter("b", "encode")
    phases.step("b")
    phases.accepted("b")
    assert not phases.followed("b")
    assert phases.take("b") == ()
