"""Small decisions on the way from pages to lines: which way up, how far, which pages, how large."""

import asyncio
import math
import os
import signal
import sys

import psutil
import pytest

from inkwell.ocr.v1 import ocr_pb2
from services.kit.faults import Fault
from services.ocr import document_converters as converters
from services.ocr.documents import orientation
from services.ocr.documents.course import Course
from services.ocr.documents.frames import Limits
from services.ocr.documents.pdf import PdfSource
from services.ocr.documents.rendering import Rendering
from services.ocr.domain import Hypothesis, Layout, LayoutLine, Recognition
from tests.support.documents import bare_pdf, encoded, written


def recognition(confidence: float, *, blank: bool = False) -> Recognition:
    return Recognition(
        (Hypothesis("" if blank else "text", -1.0, -1.0, confidence, ()),),
        truncated=False,
        decoded_token_count=1,
        mean_batch_rows=1.0,
        confidence=confidence,
        confidence_calibrated=False,
        repetition_suspected=False,
        blank=blank,
    )


def layout(*lengths: float) -> Layout:
    lines = tuple(
        LayoutLine(((0.0, 9.0 * n), (length, 9.0 * n), (length, 9.0 * n + 8), (0.0, 9.0 * n + 8)), 0.0, 1.0, 1)
        for n, length in enumerate(lengths)
    )
    return Layout(0, 0.0, lines)


# --- which way up ---


def test_the_longest_lines_are_read_for_it() -> None:
    assert orientation.probes(layout(5, 90, 20, 70, 80)) == [1, 4, 3]
    assert orientation.probes(layout(5)) == [0]
    assert orientation.probes(layout()) == []


@pytest.mark.parametrize(
    ("confidences", "doubt"), [([0.95, 0.9, 0.9], False), ([0.9, 0.4, 0.6], True), ([], False), ([0.79], True)]
)
def test_lines_that_read_surely_leave_no_doubt(confidences: list[float], doubt: bool) -> None:
    assert orientation.in_doubt([recognition(c) for c in confidences]) is doubt


def test_lines_without_writing_say_nothing() -> None:
    assert orientation.in_doubt([recognition(1.0, blank=True)])
    assert not orientation.in_doubt([recognition(0.9), recognition(0.0, blank=True)])


def test_only_what_reads_clearly_better_turns_the_page() -> None:
    weak, better, good = [recognition(0.6)], [recognition(0.65)], [recognition(0.9)]
    assert not orientation.reads_better(better, weak)
    assert orientation.reads_better(good, weak)
    assert not orientation.reads_better(weak, good)


def test_a_turned_line_begins_at_the_opposite_corner() -> None:
    (line,) = layout(50).lines
    turned = orientation.turned(line)
    assert turned.polygon == ((50.0, 8.0), (0.0, 8.0), (0.0, 0.0), (50.0, 0.0))
    assert abs(turned.angle) == 180
    assert orientation.turned(turned) == line


# --- how far ---


def test_the_estimate_goes_by_lines_and_counts_pages_not_seen_like_those_seen() -> None:
    now = 0.0
    course = Course(4, clock=lambda: now)
    assert course.eta_ms == 0
    course.pages_started, course.lines_found = 1, 10
    assert course.eta_ms == 0
    now, course.lines_done = 5.0, 5  # an eighth of some forty lines
    assert course.eta_ms == 35_000
    course.pages_started, course.lines_found, course.lines_done = 2, 30, 15
    now = 15.0
    assert course.eta_ms == 45_000
    course.pages_started = course.pages_done = 4
    course.lines_found = course.lines_done = 60
    assert course.eta_ms == 0


def test_pages_without_lines_count_as_pages() -> None:
    now = 0.0
    course = Course(3, clock=lambda: now)
    now, course.pages_started, course.pages_done = 2.0, 1, 1
    assert course.eta_ms == 4_000


def test_progress_is_not_told_all_the_time() -> None:
    now = 0.0
    course = Course(1, clock=lambda: now)
    assert course.due()
    assert not course.due()
    now = 1.0
    assert course.due()


# --- which pages ---


def chosen(*ranges: tuple[int, int], pages: int = 9, most: int = 100) -> tuple[int, ...]:
    request = ocr_pb2.ReadDocumentRequest(
        page_ranges=[ocr_pb2.PageRange(first_page=first, last_page=last) for first, last in ranges]
    )
    return converters.pages_of(converters.options_of(request, max_pages=most), pages, max_pages=most)


def test_pages_come_in_the_order_of_the_ranges() -> None:
    assert chosen() == tuple(range(1, 10))
    assert chosen((8, 0), (2, 3)) == (8, 9, 2, 3)
    assert chosen((5, 5)) == (5,)


def test_an_absurd_number_of_pages_is_refused_without_counting_them_out() -> None:
    with pytest.raises(Fault, match="2147483647 pages"):
        chosen(pages=2**31 - 1)
    with pytest.raises(Fault, match="no page 2147483647"):
        chosen((1, 2**31 - 1))


# --- how large ---

LIMITS = Limits(1_000_000, 4, 1 << 31, 60.0)


@pytest.mark.parametrize(("width", "height"), [(720, 720), (595, 842), (612.3, 20), (5000, 17.7)])
def test_the_resolution_that_is_said_to_fit_fits_and_no_larger_one(width: float, height: float) -> None:
    source = PdfSource(bare_pdf(media_box=f"0 0 {width} {height}"), Limits(20_000, 1, 1 << 31, 60.0))
    with pytest.raises(Fault) as refused:
        source.render(1, 600)
    fits = int(refused.value.data.message.partition("asked for, at ")[2].partition(" dpi")[0] or 0)
    if not fits:
        assert "72 dpi either" in refused.value.data.message
        fits = math.floor(72 * math.sqrt(20_000 / (width * height)))
        assert fits < 72
        return
    assert source.render(1, fits).width > 0
    with pytest.raises(Fault):
        source.render(1, fits + 1)


async def test_a_render_process_that_stands_still_is_ended() -> None:
    async with Rendering(LIMITS) as rendering:
        assert await rendering.open(encoded(written(0).image)) == 1
        pid = rendering.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        rendering.patience_s = 0.05
        with pytest.raises(Fault) as lost:
            await rendering.render(1, 200)
    assert lost.value.data.reason == "DOCUMENT_DAMAGED"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_render_process_ends_with_its_front() -> None:
    program = """
import asyncio
from services.ocr.documents.frames import Limits
from services.ocr.documents.rendering import Rendering
from tests.support.documents import bare_pdf

async def main():
    async with Rendering(Limits(1_000_000, 4, 1 << 31, 60.0)) as rendering:
        await rendering.open(bare_pdf())
        print(rendering.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""
    front = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    assert front.stdout is not None
    process = psutil.Process(int(await front.stdout.readline()))
    front.kill()
    await front.wait()
    await asyncio.to_thread(process.wait, 20)


async def test_a_document_that_takes_too_much_memory_is_refused() -> None:
    small = Limits(100_000_000, 4, 256 << 20, 60.0)
    async with Rendering(small) as rendering:
        await rendering.open(bare_pdf(media_box="0 0 7200 7200"))
        with pytest.raises(Fault) as refused:
            await rendering.render(1, 90)
    assert refused.value.data.reason in ("DOCUMENT_DAMAGED", "DOCUMENT_TOO_LARGE")
