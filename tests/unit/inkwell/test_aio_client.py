"""The asyncio client: the same calls, so only what is its own is tested in depth."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

import inkwell
from inkwell.batch import WINDOW
from services.kit import faults
from tests.unit.inkwell.fake_server import TIMEOUT_S, InkwellServer


async def set_event(event: object) -> None:
    """Wait for a threading.Event of the server without blocking the loop."""
    assert await asyncio.to_thread(event.wait, TIMEOUT_S)  # type: ignore[attr-defined]


async def test_reading_and_painting(aio_client: inkwell.AsyncClient, tmp_path: Path) -> None:
    (tmp_path / "line.png").write_bytes(b"say hello")
    reading = await aio_client.read(str(tmp_path / "line.png"))
    assert reading.text == "hello"
    assert reading.served_by.endpoint == "10.0.0.1:1"
    pictures = await aio_client.paint("a cat", image_count=2, seed=3)
    assert [picture.parameters.seed for picture in pictures] == [3, 4]
    assert pictures[0].served_by.runtime == "torch"


async def test_answers_equal_those_of_the_blocking_client(
    aio_client: inkwell.AsyncClient, client: inkwell.Client
) -> None:
    assert await aio_client.read(b"say a", beam_width=2) == client.read(b"say a", beam_width=2)
    assert [event async for event in aio_client.read_stream(b"say a")] == list(client.read_stream(b"say a"))
    assert [event async for event in aio_client.paint_stream("a cat", steps=3, previews=True)] == list(
        client.paint_stream("a cat", steps=3, previews=True)
    )
    assert await aio_client.models() == client.models()
    assert await aio_client.schedulers() == client.schedulers()
    assert await aio_client.fleet(service="ocr") == client.fleet(service="ocr")


async def test_events_may_be_watched(aio_client: inkwell.AsyncClient) -> None:
    seen: list[object] = []
    await aio_client.read(b"say a", on_event=seen.append)
    await aio_client.paint("a cat", steps=1, on_event=seen.append)
    assert [type(event).__name__ for event in seen] == [
        "Queued", "Started", "Partial", "ReadResult", "Queued", "Started", "Progress", "PaintResult",
    ]  # fmt: skip


@pytest.mark.parametrize("stream", [True, False])
async def test_cancelling_the_task_cancels_the_call_at_the_server(
    aio_client: inkwell.AsyncClient, server: InkwellServer, stream: bool
) -> None:
    reading = aio_client.read(b"hold", on_event=(lambda event: None) if stream else None)
    task = asyncio.create_task(reading)
    await set_event(server.held)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await set_event(server.cancelled)


async def test_closing_the_iterator_cancels_the_call_at_the_server(
    aio_client: inkwell.AsyncClient, server: InkwellServer
) -> None:
    events = aio_client.paint_stream("hold")
    async for event in events:
        if isinstance(event, inkwell.Progress) and event.step == 2:
            break
    await set_event(server.held)
    await events.aclose()
    await set_event(server.cancelled)


async def test_errors_are_the_same(aio_client: inkwell.AsyncClient, server: InkwellServer) -> None:
    server.fail_next.append(faults.overloaded("QUEUE_FULL", "full", retry_after_ms=1500))
    with pytest.raises(inkwell.Overloaded) as raised:
        await aio_client.read(b"say a")
    assert (raised.value.reason, raised.value.retry_after_s) == ("QUEUE_FULL", 1.5)
    with pytest.raises(inkwell.InvalidRequest) as invalid:
        await aio_client.paint("a cat", steps=0)
    assert invalid.value.fields[0].field == "step_count"
    with pytest.raises(inkwell.DeadlineExceeded):
        await aio_client.read(b"hold", timeout_s=0.2)


async def test_unavailable_is_retried(aio_client: inkwell.AsyncClient, server: InkwellServer) -> None:
    server.fail_next.append(faults.unavailable("LOADING", "loads", retry_after_ms=1))
    assert (await aio_client.read(b"say a")).text == "a"


async def test_waiting_for_a_server_ends() -> None:
    async with inkwell.AsyncClient("127.0.0.1:1", wait_for_ready_s=0.1) as client:
        with pytest.raises(inkwell.Unavailable, match=r"no connection within 0.1 s"):
            await client.read(b"say a")


async def test_waiting_is_short_when_the_server_is_there(server: InkwellServer) -> None:
    async with inkwell.AsyncClient(server.address, wait_for_ready_s=TIMEOUT_S) as client:
        assert (await client.read(b"say a")).text == "a"


async def test_a_closed_client_says_so(server: InkwellServer) -> None:
    client = inkwell.AsyncClient(server.address)
    await client.close()
    with pytest.raises(ValueError, match="closed"):
        await client.read(b"say a")


def pictures() -> list[tuple[str, bytes | str]]:
    return [("slow", b"last"), ("a", b"say a"), ("bad", b"bad"), ("missing", "/nowhere/line.png")]


async def pictures_async() -> AsyncIterator[tuple[str, bytes | str]]:
    for each in pictures():
        yield each


@pytest.mark.parametrize("source", [pictures, pictures_async])
async def test_many_are_read_and_fail_alone(aio_client: inkwell.AsyncClient, source: object) -> None:
    outcomes = {name: got async for name, got in aio_client.read_many(source())}  # type: ignore[operator]
    assert {name: type(got).__name__ for name, got in outcomes.items()} == {
        "slow": "Reading", "a": "Reading", "bad": "InvalidRequest", "missing": "InvalidRequest",
    }  # fmt: skip
    assert list(outcomes).index("a") < list(outcomes).index("slow")


async def test_many_are_taken_only_as_far_as_answers_are(aio_client: inkwell.AsyncClient) -> None:
    taken = 0
    full = asyncio.Event()

    def endless() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            if taken == WINDOW + 1:
                full.set()
            yield b"say a"

    outcomes = aio_client.read_many(endless())
    await anext(outcomes)
    await anext(outcomes)
    await asyncio.wait_for(full.wait(), TIMEOUT_S)
    assert taken == WINDOW + 1
    await outcomes.aclose()


async def test_what_the_callers_iterable_raises_is_raised(aio_client: inkwell.AsyncClient) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"say a"
        raise LookupError("the caller's own")

    with pytest.raises(LookupError, match="own"):
        [name async for name, _ in aio_client.read_many(broken())]


async def test_closing_many_cancels_the_call_at_the_server(
    aio_client: inkwell.AsyncClient, server: InkwellServer
) -> None:
    outcomes = aio_client.read_many([("a", b"say a"), ("b", b"hold")])
    assert (await anext(outcomes))[0] == "a"
    await set_event(server.held)
    await outcomes.aclose()
    await set_event(server.cancelled)


async def test_cancelling_a_task_that_reads_many_cancels_the_call(
    aio_client: inkwell.AsyncClient, server: InkwellServer
) -> None:
    async def read() -> None:
        async for _ in aio_client.read_many([b"hold"]):
            pass

    task = asyncio.create_task(read())
    await set_event(server.held)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await set_event(server.cancelled)


async def test_a_stream_that_breaks_raises_what_the_server_said(
    aio_client: inkwell.AsyncClient, server: InkwellServer
) -> None:
    server.break_batch_after = 1
    # Many times, because grpc.aio tells another status when the stream breaks just as something is written to it.
    for _ in range(40):
        names = []
        with pytest.raises(inkwell.InkwellError) as raised:  # noqa: PT012
            async for name, _ in aio_client.read_many([b"say a"] * 40):
                names.append(name)
        assert names == ["0"]
        assert type(raised.value) is inkwell.Unavailable
        assert raised.value.reason == "ENGINE_LOST"
