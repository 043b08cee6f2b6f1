"""Retries, waiting, and servers that are not there."""

import socket
import threading
import uuid
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


def ids(server: InkwellServer) -> list[str]:
    return [metadata["inkwell-request-id"] for metadata in server.metadata]


@pytest.mark.parametrize("call", [CALLS["read"], CALLS["paint"]], ids=["read", "paint"])
def test_attempts_at_a_call_have_one_id_and_calls_have_their_own(
    client: inkwell.Client, server: InkwellServer, call: Callable[[inkwell.Client], object]
) -> None:
    server.fail_next.extend([LOADING, LOADING])
    call(client)
    call(client)
    first, second, third, other = map(uuid.UUID, ids(server))
    assert first == second == third != other


async def test_so_do_those_of_the_client_for_asyncio(aio_client: inkwell.AsyncClient, server: InkwellServer) -> None:
    server.fail_next.append(LOADING)
    await aio_client.read(b"say a")
    await aio_client.paint("a cat")
    first, second, other = map(uuid.UUID, ids(server))
    assert first == second != other


async def test_a_caller_may_name_its_call(
    client: inkwell.Client, aio_client: inkwell.AsyncClient, server: InkwellServer
) -> None:
    name = str(uuid.uuid4())
    client.read(b"say a", request_id=name)
    client.read(b"say a", request_id=name.upper(), on_event=lambda event: None)
    list(client.read_stream(b"say a", request_id=name))
    client.read_document(b"document", request_id=name)
    client.embed(b"say a", request_id=name)
    client.paint("a cat", request_id=name)
    await aio_client.read(b"say a", request_id=name)
    [event async for event in aio_client.read_stream(b"say a", request_id=name)]
    await aio_client.read_document(b"document", request_id=name)
    await aio_client.embed(b"say a", request_id=name)
    await aio_client.paint("a cat", request_id=name)
    assert ids(server) == [name] * 11
    with pytest.raises(inkwell.InvalidRequest, match="'7' is not a UUID") as refused:
        client.read(b"say a", request_id="7")
    assert refused.value.fields[0].field == "request_id"


def test_an_id_cannot_be_sent_with_every_call() -> None:
    with pytest.raises(inkwell.InvalidRequest, match="the SDK gives each its own"):
        inkwell.Client(metadata={"inkwell-request-id": str(uuid.uuid4())})


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


async def test_waiting_takes_no_longer_than_the_call_may(free_port: int) -> None:
    with (
        inkwell.Client(f"127.0.0.1:{free_port}", wait_for_ready_s=TIMEOUT_S) as client,
        pytest.raises(inkwell.Unavailable, match=r"no connection within 0.1 s"),
    ):
        client.read(b"say a", timeout_s=0.1)
    async with inkwell.AsyncClient(f"127.0.0.1:{free_port}", wait_for_ready_s=TIMEOUT_S) as aio_client:
        with pytest.raises(inkwell.Unavailable, match=r"no connection within 0.1 s"):
            await aio_client.read(b"say a", timeout_s=0.1)


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
