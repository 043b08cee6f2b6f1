"""Every kind of bad input, through the gateway: a precise error that names the field, and the services go on."""

import io
import struct
import zlib
from collections.abc import Callable, Iterator

import pytest
from PIL import Image

import inkwell
from services import local


@pytest.fixture(scope="module")
def client(fleet: dict[str, local.Service]) -> Iterator[inkwell.Client]:
    with inkwell.Client(fleet["gateway"].address, timeout_s=30) as opened:
        yield opened


def png(width: int, height: int, body: bytes) -> bytes:
    """A PNG with the header of a black-and-white picture of that size, whatever its body."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def bomb() -> bytes:
    """30,000 x 30,000 pixels in well under a megabyte."""
    row = bytes(1 + 30_000 // 8)
    packer = zlib.compressobj(9)
    return png(30_000, 30_000, b"".join([*(packer.compress(row * 1000) for _ in range(30)), packer.flush()]))


def sample() -> bytes:
    return sorted(local.SAMPLES.glob("*.png"))[0].read_bytes()


Call = Callable[[inkwell.Client], object]

BAD: dict[str, tuple[Call, type[inkwell.InkwellError], str]] = {
    "an empty body": (lambda c: c.read(b""), inkwell.InvalidRequest, "image.content"),
    "a truncated image": (lambda c: c.read(sample()[:200]), inkwell.InvalidRequest, "image.content"),
    "no image": (lambda c: c.read(b"words, just words"), inkwell.InvalidRequest, "image.content"),
    "a decompression bomb": (lambda c: c.read(bomb()), inkwell.InkwellError, "image.content"),
    "no pixels": (lambda c: c.read(png(0, 7, zlib.compress(b""))), inkwell.InvalidRequest, "image.content"),
    "an unknown reader": (lambda c: c.read(sample(), model="nobody"), inkwell.NotFound, "model"),
    "a beam too many": (lambda c: c.read(sample(), beam_width=17), inkwell.InvalidRequest, "decoding.beam_width"),
    "an unknown painter": (lambda c: c.paint("x", model="nobody"), inkwell.NotFound, "model"),
    "an unknown scheduler": (lambda c: c.paint("x", scheduler="turbo"), inkwell.InkwellError, "scheduler"),
    "no steps": (lambda c: c.paint("x", steps=0), inkwell.InvalidRequest, "step_count"),
    "10,000 steps": (lambda c: c.paint("x", steps=10_000), inkwell.InvalidRequest, "step_count"),
    "an odd width": (lambda c: c.paint("x", width=63), inkwell.InvalidRequest, "width"),
    "a huge picture": (lambda c: c.paint("x", width=65_536, height=65_536), inkwell.InkwellError, "width"),
    "a prompt of 100 KB": (lambda c: c.paint("x" * 100_000), inkwell.InkwellError, "prompt"),
    "a message over the limit": (lambda c: c.read(bytes(70 << 20)), inkwell.InkwellError, "message"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_precisely_and_the_service_goes_on(client: inkwell.Client, name: str) -> None:
    call, expected, field = BAD[name]
    with pytest.raises(expected) as refused:
        call(client)
    assert not isinstance(refused.value, (inkwell.InternalError, inkwell.Unavailable, inkwell.DeadlineExceeded))
    assert field in [violation.field for violation in refused.value.fields]
    assert any(violation.description for violation in refused.value.fields)
    assert client.read(sample()).text


def test_several_wrong_fields_are_all_named(client: inkwell.Client) -> None:
    with pytest.raises(inkwell.InvalidRequest) as refused:
        client.paint("x", steps=0, width=63, image_count=99)
    assert {"step_count", "width", "image_count"} <= {violation.field for violation in refused.value.fields}


def test_an_image_of_every_kind_reads_the_same(client: inkwell.Client) -> None:
    picture = Image.open(io.BytesIO(sample())).convert("L")
    expected = client.read(sample()).text
    for kind in ("PNG", "TIFF", "BMP"):
        encoded = io.BytesIO()
        picture.save(encoded, kind)
        assert client.read(encoded.getvalue()).text == expected
