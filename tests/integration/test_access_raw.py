"""Header fields that no gRPC client would send, written onto the wire by hand: none of them reaches a service."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.support import gateway as gateways
from tests.support.backend import UNARY, Backend
from tests.support.gateway import Gateway, pool

_DATA, _HEADERS, _RESET, _GOAWAY = 0x0, 0x1, 0x3, 0x7
_END_STREAM, _END_HEADERS = 0x1, 0x4


@pytest.fixture
async def backend() -> AsyncIterator[Backend]:
    started = await Backend().start()
    yield started
    await started.stop()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _literal(name: bytes, value: bytes) -> bytes:
    """A field of HPACK that is in no table and not compressed (RFC 7541, 6.2.2), of less than 127 bytes each."""
    assert len(name) < 127
    assert len(value) < 127
    return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value


async def send(gateway: Gateway, *fields: tuple[bytes, bytes]) -> None:
    """A unary call with these fields beside those that every call has; returns when the gateway has ended it."""
    usual = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", UNARY.encode()),
        (b":authority", b"localhost"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
    ]
    block = b"".join(_literal(*field) for field in (*usual, *fields))
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.server.port)
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(0x4, 0, 0, b""))
    writer.write(_frame(_HEADERS, _END_HEADERS, 1, block) + _frame(_DATA, _END_STREAM, 1, bytes(5)))
    try:
        async with asyncio.timeout(60):
            while True:
                head = await reader.readexactly(9)
                await reader.readexactly(int.from_bytes(head[:3], "big"))
                kind, flags, stream = head[3], head[4], int.from_bytes(head[5:9], "big")
                if kind in (_RESET, _GOAWAY) or (stream == 1 and kind in (_DATA, _HEADERS) and flags & _END_STREAM):
                    return
    except (asyncio.IncompleteReadError, ConnectionError):
        return  # the gateway closed the connection
    finally:
        writer.close()


async def test_a_call_written_by_hand_arrives(backend: Backend) -> None:
    async with gateways.running(pool("ocr", backend)) as gateway:
        await send(gateway, (b"x-fine", b"yes"))
        assert backend.metadata["x-fine"] == "yes"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"x-evil", b"a\r\ninkwell-caller: root"),
        (b"x-evil", b"a\nb"),
        (b"x-evil", b"a\x00b"),
        (b"x-evil", b"\xff\xfe"),
        (b"x-evil\r\ninkwell-caller", b"root"),
        (b"Inkwell-Caller", b"root"),
        (b"inkwell-caller ", b"root"),
        (b"inkwell-caller", b"root"),
        (b"inkwell-caller-bin", b"cm9vdA"),
        (b"grpc-status", b"0"),
        (b"grpc-previous-rpc-attempts", b"9"),
        (b"grpc-trace-bin", b"AAAA"),
        (b":path", b"/grpc.channelz.v1.Channelz/GetServers"),
    ],
)
async def test_what_could_be_understood_in_two_ways_does_not(backend: Backend, name: bytes, value: bytes) -> None:
    async with gateways.running(pool("ocr", backend)) as gateway:
        await send(gateway, (name, value))
        for key, seen in backend.metadata.items():
            assert not key.lower().startswith(
                ("inkwell-caller", "x-evil", "grpc-status", "grpc-previous", "grpc-trace")
            )
            text = seen if isinstance(seen, bytes) else str(seen).encode()
            assert b"root" not in text
            assert not set(text) & set(b"\r\n\x00")
        # And the gateway is none the worse for it.
        await gateway.channel.unary_unary(UNARY)(b"", metadata=(("x-after", "1"),), timeout=60)
        assert backend.metadata["x-after"] == "1"
