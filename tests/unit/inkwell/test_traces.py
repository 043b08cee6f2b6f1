"""A program that uses OpenTelemetry finds Inkwell's spans in its own trace."""

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState

import inkwell
from tests.unit.inkwell.fake_server import InkwellServer

TRACE, SPAN = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

CALLS: dict[str, Callable[[inkwell.Client], object]] = {
    "read": lambda client: client.read(b"say a"),
    "paint": lambda client: client.paint("a cat"),
    "many": lambda client: list(client.read_many([b"say a"])),
    "models": lambda client: client.models("ocr"),
}


@pytest.fixture
def in_a_span() -> Iterator[None]:
    state = TraceState([("vendor", "1")])
    context = SpanContext(TRACE, SPAN, is_remote=False, trace_flags=TraceFlags(1), trace_state=state)
    with trace.use_span(NonRecordingSpan(context)):
        yield


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.usefixtures("in_a_span")
def test_every_call_says_which_trace_it_belongs_to(
    client: inkwell.Client, server: InkwellServer, call: Callable[[inkwell.Client], object]
) -> None:
    call(client)
    assert [(m["traceparent"], m["tracestate"]) for m in server.metadata] == [(PARENT, "vendor=1")]


@pytest.mark.usefixtures("in_a_span")
async def test_so_does_the_client_for_asyncio(aio_client: inkwell.AsyncClient, server: InkwellServer) -> None:
    await aio_client.read(b"say a")
    [_ async for _ in aio_client.read_many([b"say a"])]
    assert [m["traceparent"] for m in server.metadata] == [PARENT, PARENT]


@pytest.mark.usefixtures("in_a_span")
def test_what_the_program_says_itself_stays(server: InkwellServer) -> None:
    own = PARENT.replace("01", "00", 1)
    with inkwell.Client(server.address, timeout_s=20, metadata={"traceparent": own}) as client:
        client.read(b"say a")
    assert server.metadata[0]["traceparent"] == own


def test_outside_of_a_span_nothing_is_said(client: inkwell.Client, server: InkwellServer) -> None:
    client.read(b"say a")
    assert "traceparent" not in server.metadata[0]


def test_the_sdk_brings_no_opentelemetry_along() -> None:
    said = "import sys, inkwell; print([name for name in sys.modules if name.startswith('opentelemetry')])"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
