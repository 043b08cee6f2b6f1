"""Reading a request for its routing costs little, whatever is in it."""

import pytest

from inkwell.ocr.v1 import ocr_pb2
from services.gateway import asked
from services.gateway.asked import scan
from services.gateway.methods import METHODS

RECOGNIZE = METHODS["/inkwell.ocr.v1.OcrService/Recognize"]


class Counted(bytes):
    """Counts how often it is looked into."""

    looks = 0

    def __getitem__(self, at):  # type: ignore[no-untyped-def]
        Counted.looks += 1
        return super().__getitem__(at)


@pytest.mark.parametrize("pattern", [b"\0\0", b"\x08\0", b"\x12\0", b"\xf8\xff\xff\xff\x0f\0"])
def test_a_large_message_of_tiny_fields_is_read_in_part(pattern: bytes) -> None:
    Counted.looks = 0
    scan(Counted(pattern * 100_000), (1,))
    assert Counted.looks <= 100_000


def test_a_model_behind_many_fields_and_a_large_picture_is_found() -> None:
    request = ocr_pb2.RecognizeRequest(model="fine", language_hints=["fr"] * 1000)
    request.image.content = bytes(1 << 20)
    assert asked.read(RECOGNIZE, request.SerializeToString()).model == "fine"
    hints_first = ocr_pb2.RecognizeRequest(language_hints=["fr"] * 1000).SerializeToString()
    assert asked.read(RECOGNIZE, hints_first + request.SerializeToString()).model == "fine"
