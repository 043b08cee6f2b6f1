"""Which texts go round in circles."""

import csv
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ocr.engine.repetition import goes_round

SAMPLES = Path(__file__).resolve().parents[3] / "models" / "handwriting-tiny" / "samples" / "labels.tsv"


@pytest.mark.parametrize(
    "text",
    [
        "aaaaaaaaaaaaaaaaaaaa",
        "the the the the the the",
        "He said that the the the the the the the th",
        "of the house of the house of the house of the house",
        "1919191919191919",
        "Straße Straße Straße Stra",
        "ab ab ab ab ab ab ab ab, well",  # left the circle at the very end
        "........................",
    ],
)
def test_circles_are_told(text: str) -> None:
    assert goes_round(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "ha ha ha",
        "Ha ha ha ha!",
        "1000000",
        "1000000000000",
        "0000 0000",
        "....",
        "..........",
        "Mississippi",
        "no, no, no",
        "principal - - - - . Depuis le moment où",
        "to be or not to be, that is the question",
        "bla bla bla, so they said, and went on to talk about the weather",
        "New York, New York",
    ],
)
def test_what_people_write_is_not(text: str) -> None:
    assert not goes_round(text)


@given(run=st.text("abcde ", min_size=1, max_size=12), before=st.text("xyz", max_size=30), times=st.integers(3, 9))
def test_a_circle_at_the_end_is_told_from_its_thirteenth_repeated_character(run: str, before: str, times: int) -> None:
    text = before + run * times
    if len(run) * (times - 1) >= 12:
        assert goes_round(text)


@pytest.mark.parametrize("folder", ["samples", os.environ.get("INKWELL_TEST_LABELS", "")])
def test_no_label_is_a_circle(folder: str) -> None:
    if not folder:
        pytest.skip("INKWELL_TEST_LABELS names no folder with labels.tsv files")
    files = [SAMPLES] if folder == "samples" else sorted(Path(folder).rglob("labels.tsv"))
    for file in files:
        with file.open(encoding="utf-8", newline="") as opened:
            for row in csv.DictReader(opened, delimiter="\t", quoting=csv.QUOTE_NONE):
                assert not goes_round(row["text"]), row
