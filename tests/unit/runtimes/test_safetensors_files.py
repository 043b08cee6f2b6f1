"""What is known of a safetensors file without reading its weights, and what is said of one that is not whole."""

import json
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from services.runtimes import safetensors_files


def safetensors(shapes: dict[str, list[int]]) -> bytes:
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = 4
        for side in shape:
            size *= side
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}  # type: ignore[dict-item]
        end += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def test_numbers_are_counted_without_reading_them(tmp_path: Path) -> None:
    assert safetensors_files.number_count_in(tmp_path) is None
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(safetensors({"a": [2, 3], "b": []}))
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(safetensors({"c": [4]}))
    assert safetensors_files.number_count_in(tmp_path) == 6 + 1 + 4


@given(st.integers(0, 400), st.binary(max_size=3))
def test_a_damaged_file_is_named_whatever_is_wrong_with_it(length: int, rest: bytes) -> None:
    whole = safetensors({"a": [5], "b": [7]})
    damaged = whole[:length] + rest
    # Other numbers in a file of the same length are a file like any other.
    assume(len(damaged) != len(whole))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
            safetensors_files.number_count_in(Path(folder))
