"""The books of one BatchRecognize stream: which images are under way, and what became of them.

Images get numbers of this SDK's own on the wire, so that a caller's ids may be of any length and may repeat.
"""

import os
from collections import deque
from collections.abc import Iterator
from typing import TypeAlias

from inkwell import types
from inkwell.channel import BATCH_REQUEST_BYTES_MOST, ENVELOPE_BYTES
from inkwell.converters import read
from inkwell.errors import FieldViolation, InkwellError, InternalError, InvalidRequest, error_from_status
from inkwell.ocr.v1 import ocr_pb2

BatchItem: TypeAlias = types.ImageSource | tuple[str, types.ImageSource]
"""A picture, or (id, picture)."""

Outcome: TypeAlias = tuple[str, types.Reading | InkwellError]
"""(id, what was read or why not)."""

WINDOW = 16
"""Images under way on one stream at most: sent, and their answer not yet taken by the caller."""

IMAGE_BYTES_MOST = BATCH_REQUEST_BYTES_MOST - ENVELOPE_BYTES
"""The longest image on such a stream."""


class BatchBook:
    """Numbers images, keeps what failed before it was sent, and joins answers to the caller's ids."""

    def __init__(self, options: read.ReadOptions) -> None:
        self._options = options
        self._count = 0
        self._under_way: dict[str, str] = {}
        self._failed: deque[Outcome] = deque()
        self.source_error: Exception | None = None
        """What the caller's own iterable raised."""

    def identify(self, item: BatchItem) -> tuple[str, types.ImageSource]:
        """The caller's id for an item: its own, else its path, else its position from 0."""
        position = self._count
        self._count += 1
        if isinstance(item, tuple):
            return item
        if isinstance(item, bytes | bytearray | memoryview):
            return str(position), item
        return os.fspath(item), item

    def request(self, caller_id: str, content: bytes) -> ocr_pb2.BatchRecognizeRequest:
        """What to send; raises InvalidRequest for options that no image could be sent with."""
        wire_id = str(self._count)
        request = read.batch_recognize_request(wire_id, content, self._options)
        self._under_way[wire_id] = caller_id
        return request

    def fail(self, caller_id: str, error: InkwellError) -> None:
        """An image that will not be sent."""
        self._failed.append((caller_id, error))

    def fail_unreadable(self, caller_id: str, error: OSError) -> None:
        """An image whose file cannot be read."""
        text = f"cannot read {caller_id}: {error.strerror or error}"
        violation = FieldViolation("image", text)
        self.fail(caller_id, InvalidRequest(text, reason="FILE_UNREADABLE", fields=(violation,)))

    def failures(self) -> Iterator[Outcome]:
        """The failures since the last look."""
        while self._failed:
            yield self._failed.popleft()

    def outcome(self, response: ocr_pb2.BatchRecognizeResponse, served: types.ServedBy) -> Outcome | None:
        """None for an answer to nothing that was asked, or of a kind that this version does not know."""
        caller_id = self._under_way.pop(response.id, None)
        if caller_id is None:
            return None
        if response.WhichOneof("outcome") == "error":
            return caller_id, error_from_status(response.error)
        try:
            return caller_id, read.reading(response.result, served)
        except InkwellError as error:
            return caller_id, error

    def unanswered(self) -> Iterator[Outcome]:
        """What a stream that ended well left without an answer."""
        for caller_id in self._under_way.values():
            yield caller_id, InternalError("the server ended the stream without an answer", reason="NO_RESULT")
