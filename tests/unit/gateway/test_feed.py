"""The request stream: what each attempt is sent, whatever the attempts before it did."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.feed import RequestFeed


class Upstream:
    """Takes `most` messages, then refuses as a call that its endpoint has ended."""

    def __init__(self, most: int) -> None:
        self.taken: list[bytes] = []
        self.half_closed = asyncio.Event()
        self.refused = asyncio.Event()
        self.cancelled = False
        self._most = most
        self._cython_call = self

    async def wait_for_connection(self) -> None:
        await asyncio.sleep(0)

    async def send_serialized_message(self, message: bytes) -> None:
        await asyncio.sleep(0)
        if len(self.taken) == self._most:
            self.refused.set()
            raise grpc.aio.InternalError("Failed to send")
        self.taken.append(message)

    async def done_writing(self) -> None:
        self.half_closed.set()

    def cancel(self) -> None:
        self.cancelled = True
        self.half_closed.set()


async def stream(messages: list[bytes]) -> AsyncIterator[bytes]:
    for message in messages:
        yield message


@given(messages=st.lists(st.binary(min_size=1, max_size=5), max_size=8), data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_attempt_is_sent_the_stream_from_its_beginning(messages: list[bytes], data: st.DataObject) -> None:
    most = data.draw(st.lists(st.integers(0, max(0, len(messages) - 1)), max_size=3)) if messages else []

    async def check() -> None:
        feed = RequestFeed(stream(messages), keep_bytes=1000)
        for limit in most:
            refusing: Any = Upstream(limit)
            feed.attach(refusing)
            await refusing.refused.wait()
            assert refusing.taken == messages[:limit]
            assert feed.repeatable
        taking: Any = Upstream(len(messages) + 1)
        feed.attach(taking)
        await taking.half_closed.wait()
        await feed.close()
        assert taking.taken == messages

    asyncio.run(check())


async def test_a_stream_longer_than_the_bound_is_passed_on_but_not_kept() -> None:
    feed = RequestFeed(stream([b"12345"] * 100), keep_bytes=20)
    upstream: Any = Upstream(1000)
    feed.attach(upstream)
    await upstream.half_closed.wait()
    assert upstream.taken == [b"12345"] * 100
    assert not feed.repeatable
    assert feed._messages == []
    await feed.close()


async def test_after_the_answer_began_nothing_is_kept() -> None:
    taken = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b"a"
        taken.set()
        await asyncio.Event().wait()

    feed = RequestFeed(slow(), keep_bytes=1000)
    upstream: Any = Upstream(10)
    feed.attach(upstream)
    await taken.wait()
    assert feed._messages == [b"a"]
    feed.commit()
    assert feed._messages == []
    assert not feed.repeatable
    await feed.close()


async def test_a_message_that_cannot_be_taken_in_ends_the_attempt() -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"a"
        raise ValueError("too large")

    feed = RequestFeed(broken(), keep_bytes=1000)
    upstream: Any = Upstream(10)
    feed.attach(upstream)
    await upstream.half_closed.wait()
    assert upstream.cancelled
    with pytest.raises(ValueError, match="too large"):
        raise feed.error or AssertionError
    await feed.close()


async def test_nothing_is_read_from_the_caller_while_no_endpoint_takes_it() -> None:
    read = 0

    async def counted() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(50):
            read += 1
            yield b"a"

    feed = RequestFeed(counted(), keep_bytes=1000)
    refusing: Any = Upstream(2)
    feed.attach(refusing)
    await refusing.refused.wait()
    for _ in range(20):
        await asyncio.sleep(0)
    assert read == 3
    await feed.close()
