"""Retries, waiting, and servers that are not there."""

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

import inkwell
from services.kit import faults
from tests.unit.inkwell.fake_server import TIMEOUT_S, InkwellServer

LOADING = faults.unavailable("LOADING", "the model loads", retry_after_ms=1)


@pytest.fixture
def free_port() -> Iterator[int]:
    """Nobody listens there, and nobody else gets it: it stays bound, with SO_REUSEPORT for the test's own server."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


CALLS: dict[str, Callable[[inkwell.Client], object]] = {
    "read": lambda client: client.read(b"say a"),
    "a long read": lambda client: client.read(b"say " + b"a" * 1_000_000),  # beyond gRPC's own retry buffer
    "paint": lambda client: client.paint("a cat"),
    "many": lambda client: list(client.read_many([b"say a", b"say b"])),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_unavailable_is_retried(
    client: inkwell.Client, server: InkwellServer, call: Callable[[inkwell.Client], object]
) -> None:
    server.fail_next.append(LOADING)
    assert call(client)
    assert not server.fail_next


def test_other_refusals_are_not_retried(client: inkwell.Client, server: InkwellServer) -> None:
    server.fail_next.append(faults.overloaded("QUEUE_FULL", "full", retry_after_ms=1))
    with pytest.raises(inkwell.Overloaded):
        client.read(b"say a")
    assert len(server.requests) == 1


def test_retries_end(client: inkwell.Client, server: InkwellServer) -> None:
    server.fail_next.extend([LOADING] * 10)
    with pytest.raises(inkwell.Unavailable):
        client.read(b"say a")
    assert len(server.requests) == 4


def test_nothing_is_retried_once_an_answer_began(client: inkwell.Client, server: InkwellServer) -> None:
    server.break_batch_after = 1
    with pytest.raises(inkwell.Unavailable):
        list(client.read_many([b"say a", b"say b"]))
    assert server.requests.count(None) == 1  # calls, as opposed to pictures


def test_an_unreachable_server_is_named(free_port: int) -> None:
    with inkwell.Client(f"127.0.0.1:{free_port}") as client, pytest.raises(inkwell.Unavailable) as raised:
        client.read(b"say a")
    error = raised.value
    assert error.message.startswith(f"cannot reach 127.0.0.1:{free_port}: ")
    assert error.reason == "UNREACHABLE"
    assert "Check the address" in error.hint


def test_waiting_for_a_server_ends(free_port: int) -> None:
    with (
        inkwell.Client(f"127.0.0.1:{free_port}", wait_for_ready_s=0.1) as client,
        pytest.raises(inkwell.Unavailable, match=r"no connection within 0.1 s"),
    ):
        client.read(b"say a")


def test_a_client_that_waits_gets_a_server_that_comes_later(free_port: int) -> None:
    texts: list[str] = []
    attempted = threading.Event()

    def read() -> None:
        with inkwell.Client(f"127.0.0.1:{free_port}", wait_for_ready_s=TIMEOUT_S) as client:
            attempted.set()
            texts.append(client.read(b"say at last").text)

    reader = threading.Thread(target=read)
    reader.start()
    assert attempted.wait(TIMEOUT_S)
    server = InkwellServer(port=free_port)
    try:
        reader.join(TIMEOUT_S)
        assert texts == ["at last"]
    finally:
        server.stop()


def test_a_closed_client_says_so(server: InkwellServer) -> None:
    client = inkwell.Client(server.address)
    client.close()
    with pytest.raises(ValueError, match="closed"):
        client.read(b"say a")
