"""Documents through the gateway: large requests, many large answers, one after another."""

import asyncio
import hashlib
import random
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc

from inkwell.ocr.v1 import ocr_pb2, ocr_pb2_grpc
from services import local
from tests.support.backend import READ_DOCUMENT, Backend
from tests.support.documents import alike, encoded, written
from tests.support.gateway import pool, running

MIB = 1 << 20


async def test_a_large_document_and_its_large_answers_pass_unchanged_one_by_one() -> None:
    content = random.Random(1).randbytes(48 * MIB)
    go_on = asyncio.Event()

    async def read(requests: AsyncIterator[bytes], _context: Any) -> AsyncGenerator[bytes, None]:
        received = await anext(aiter(requests))
        yield hashlib.sha256(received).digest()
        await go_on.wait()  # the caller has the first answer before there is a second
        for piece in range(12):
            yield received[piece * MIB : (piece + 1) * MIB + 100]

    backend = await Backend(read).start()
    try:
        async with running(pool("ocr-cpu", backend)) as gateway:
            call = gateway.channel.unary_stream(READ_DOCUMENT)(content)
            assert await call.read() == hashlib.sha256(content).digest()
            go_on.set()
            for piece in range(12):
                assert await call.read() == content[piece * MIB : (piece + 1) * MIB + 100]
            assert await call.read() is grpc.aio.EOF
    finally:
        await backend.stop()


async def test_a_caller_who_leaves_ends_the_document_behind_the_gateway() -> None:
    async def endless(requests: AsyncIterator[bytes], _context: Any) -> AsyncGenerator[bytes, None]:
        async for _ in requests:
            while True:
                yield b"progress"
                await asyncio.sleep(0)

    backend = await Backend(endless).start()
    try:
        async with running(pool("ocr-cpu", backend)) as gateway:
            call = gateway.channel.unary_stream(READ_DOCUMENT)(b"a document")
            assert await call.read() == b"progress"
            call.cancel()
            await backend.cancelled.wait()
    finally:
        await backend.stop()


def test_a_page_is_read_through_the_gateway(fleet: dict[str, local.Service]) -> None:
    page = written(1, 6)
    with grpc.insecure_channel(fleet["gateway"].address) as channel:
        request = ocr_pb2.ReadDocumentRequest(content=encoded(page.image), export_formats=[ocr_pb2.EXPORT_FORMAT_TEXT])
        responses = list(ocr_pb2_grpc.OcrServiceStub(channel).ReadDocument(request))
    assert [response.sequence for response in responses] == list(range(1, len(responses) + 1))
    (export,) = [response.export for response in responses if response.HasField("export")]
    assert alike(export.content.decode().splitlines(), page.texts)
    assert responses[-1].result.line_count == 2
