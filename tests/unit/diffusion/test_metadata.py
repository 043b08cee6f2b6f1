"""What is embedded in a picture comes out of it again."""

import io
import json
import struct

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from services.diffusion import metadata
from services.diffusion.domain import MEDIA_TYPES, Parameters, shortest_float32

PARAMETERS = Parameters("emoji-tiny", "red panda", "blurry, dark", 64, 48, 20, 1.5, "euler_ancestral", 4294967295)
PICTURE = Image.linear_gradient("L").resize((16, 16)).convert("RGB")

# What limits.py lets through: anything but control characters other than tab and line breaks.
prompts = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"], include_characters="\t\n\r"), max_size=60)
parameters = st.builds(
    Parameters,
    model=st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=20),
    prompt=prompts,
    negative_prompt=prompts,
    width=st.integers(8, 2048),
    height=st.integers(8, 2048),
    step_count=st.integers(1, 200),
    guidance_scale=st.floats(0, 30, width=32).map(shortest_float32),
    scheduler=st.sampled_from(["ddim", "dpmpp_2m_karras", "HomeMadeScheduler"]),
    seed=st.integers(0, 2**32 - 1),
)


@pytest.mark.parametrize("media_type", MEDIA_TYPES)
@given(wanted=parameters)
def test_every_field_comes_back(media_type: str, wanted: Parameters) -> None:
    content = metadata.encode(PICTURE, wanted, media_type, 90)
    embedded, text = metadata.read(content)
    assert embedded == wanted
    assert text == metadata.infotext(wanted)
    assert metadata.encode(PICTURE, wanted, media_type, 90) == content


def test_the_text_is_what_other_tools_read() -> None:
    assert metadata.infotext(PARAMETERS) == (
        "red panda\n"
        "Negative prompt: blurry, dark\n"
        "Steps: 20, Sampler: Euler a, CFG scale: 1.5, Seed: 4294967295, Size: 64x48, Model: emoji-tiny"
    )
    bare = msgspec.structs.replace(PARAMETERS, negative_prompt="", model="a, b: c")
    assert metadata.infotext(bare).splitlines()[1].endswith('Model: "a, b: c"')


def test_a_png_holds_both_as_text_chunks() -> None:
    image = Image.open(io.BytesIO(metadata.encode(PICTURE, PARAMETERS, "image/png", 90)))
    image.load()
    assert image.info["parameters"] == metadata.infotext(PARAMETERS)
    assert json.loads(image.info["inkwell"]) == {
        "model": "emoji-tiny",
        "prompt": "red panda",
        "negative_prompt": "blurry, dark",
        "width": 64,
        "height": 48,
        "step_count": 20,
        "guidance_scale": 1.5,
        "scheduler": "euler_ancestral",
        "seed": 4294967295,
    }


@pytest.mark.parametrize("media_type", ["image/jpeg", "image/webp"])
def test_jpeg_and_webp_hold_both_as_exif(media_type: str) -> None:
    exif = Image.open(io.BytesIO(metadata.encode(PICTURE, PARAMETERS, media_type, 90))).getexif()
    assert json.loads(exif[0x010E])["seed"] == 4294967295
    comment = exif.get_ifd(0x8769)[0x9286]
    assert comment == b"UNICODE\0" + metadata.infotext(PARAMETERS).encode("utf-16-be")


def test_the_size_told_is_the_size_taken() -> None:
    empty = msgspec.structs.replace(PARAMETERS, prompt="")
    long = msgspec.structs.replace(PARAMETERS, prompt="é" * 1000)
    grown = metadata.exif_size(long) - metadata.exif_size(empty)
    files = [len(metadata.encode(PICTURE, p, "image/jpeg", 90)) for p in (empty, long)]
    assert abs((files[1] - files[0]) - grown) < 8


def test_quality_decides_the_size() -> None:
    for media_type in ("image/jpeg", "image/webp"):
        small, large = (metadata.encode(PICTURE, PARAMETERS, media_type, quality) for quality in (5, 100))
        assert len(small) < len(large)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0 not a jpeg"])
def test_reading_what_is_no_picture(content: bytes) -> None:
    with pytest.raises(ValueError, match="not a PNG, JPEG or WebP picture"):
        metadata.read(content)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_reading_a_picture_of_someone_else(kind: str) -> None:
    buffer = io.BytesIO()
    PICTURE.save(buffer, kind)
    with pytest.raises(ValueError, match="carries no parameters"):
        metadata.read(buffer.getvalue())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": 3}'])
def test_reading_json_that_is_something_else(text: str) -> None:
    with pytest.raises(ValueError, match="not the parameters"):
        metadata.from_json(text)


def as_sent(value: float) -> float:
    """What a 32-bit float field makes of a number."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


@given(st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False))
@example(as_sent(3.4025e38))  # 3.403e38, rounded, is more than the largest
def test_a_shortened_number_is_the_same_on_the_wire(value: float) -> None:
    assert as_sent(shortest_float32(value)) == value


@given(st.integers(0, 30_000))
def test_a_guidance_scale_comes_back_as_it_was_typed(thousandths: int) -> None:
    typed = thousandths / 1000
    assert shortest_float32(as_sent(typed)) == typed
