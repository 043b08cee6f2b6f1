"""From pages to lines: a page is rendered and its lines found while those of the page before are still being read.

    render -> layout -> which way up -> [crop -> read] for each line -> page done

At most two pages' pixels are held at a time, and only so many lines are in the engine's queue, so that a document
leaves the others their share whatever its length.
"""

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from services.kit.admission import Priority
from services.kit.engine_host import EngineHost
from services.kit.faults import Fault, too_large
from services.ocr.crops import crop_line
from services.ocr.documents import orientation
from services.ocr.documents.rendering import Rendering
from services.ocr.documents.result import LineResult, PageInfo, PageResult, Tally
from services.ocr.documents.work import Worker
from services.ocr.domain import Decoding, Layout, LayoutJob, LayoutLine, Page, ReadJob, Recognition

# Finding the lines of a page against reading one line greedily with the embedded model: 8 times as long, measured side
# by side on one core with an A4 page of 18 lines at 200 dpi.
LAYOUT_COST = 10.0
_PAGES_HELD = 2


@dataclass(frozen=True)
class Plan:
    """What is to be read and how, all of it checked."""

    pages: tuple[int, ...]  # from 1, in the order wanted
    dpi: int
    model: str
    decoding: Decoding
    min_confidence: float  # 0 to 1
    rotation: int | None  # degrees clockwise that bring pages upright; None: find out


# --- what comes of it ---

# A line counts, holds no writing, or is less sure than was asked for.
Outcome = Literal["read", "blank", "dropped"]


@dataclass(frozen=True)
class Taken:
    """The engine took up the first job."""


@dataclass(frozen=True)
class PageStarted:
    """The page's lines are found and will be read."""

    info: PageInfo


@dataclass(frozen=True)
class LineDone:
    """A line was read; `line` is None unless the outcome is "read"."""

    page: int
    outcome: Outcome
    line: LineResult | None
    recognition: Recognition


@dataclass(frozen=True)
class PageDone:
    """Every line of the page was read."""

    result: PageResult


Event = Taken | PageStarted | LineDone | PageDone


@dataclass
class _Prepared:
    """A page whose lines are found."""

    info: PageInfo
    pixels: Page
    layout: Layout
    # Lines that were read already, to find out which way up the page is, by their index.
    known: dict[int, "_Reading"] = field(default_factory=dict)


@dataclass(frozen=True)
class _Reading:
    recognition: Recognition
    queue_ms: float
    engine_ms: float


class Reader:
    """Reads one document. Iterate over `events` once; leaving it early cancels everything that is under way."""

    def __init__(
        self,
        host: EngineHost,
        rendering: Rendering,
        plan: Plan,
        *,
        priority: Priority,
        executor: Executor,
        lines_in_flight: int,
        max_page_lines: int,
        wait_ready_s: float,
    ) -> None:
        self.tally = Tally()
        self._plan = plan
        self._rendering = rendering
        self._executor = executor
        self._max_page_lines = max_page_lines
        self._worker = Worker(host, priority, wait_ready_s=wait_ready_s, on_accepted=self._on_accepted)
        self._lines = asyncio.Semaphore(lines_in_flight)
        self._pages = asyncio.Semaphore(_PAGES_HELD)
        self._prepared: asyncio.Queue[_Prepared] = asyncio.Queue(maxsize=1)
        # Bounded, so that a caller who does not listen holds the document up and not the memory.
        self._events: asyncio.Queue[Event | None] = asyncio.Queue(maxsize=64)
        self._taken = False

    async def events(self) -> AsyncGenerator[Event, None]:
        """What happens, until the last page is done; raises Fault."""
        running = asyncio.create_task(self._run(), name="document")
        try:
            while (event := await self._events.get()) is not None:
                yield event
            await running
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._prepare_pages(), name="document-pages")
                tasks.create_task(self._read_pages(tasks), name="document-lines")
        except BaseExceptionGroup as group:
            faults = group.subgroup(Fault)
            raise group if faults is None else _first(faults) from None
        finally:
            # Room is made for it: nobody may wait for an end that does not come.
            while self._events.full():
                self._events.get_nowait()
            self._events.put_nowait(None)

    def _on_accepted(self) -> None:
        if not self._taken:
            self._taken = True
            self._events.put_nowait(Taken())  # the very first event of all: there is room

    # --- pages ---

    async def _prepare_pages(self) -> None:
        for page in self._plan.pages:
            await self._pages.acquire()
            rendered = await self._rendering.render(page, self._plan.dpi)
            pixels = Page(rendered.width, rendered.height, rendered.pixels)
            layout, known = await self._lay_out(page, pixels)
            info = PageInfo(
                page, pixels.width, pixels.height, rendered.dpi, layout.rotation, layout.skew, len(layout.lines)
            )
            del rendered
            await self._prepared.put(_Prepared(info, pixels, layout, known))
            del pixels

    async def _lay_out(self, page: int, pixels: Page) -> tuple[Layout, dict[int, _Reading]]:
        layout = await self._find_lines(page, pixels, self._plan.rotation)
        if self._plan.rotation is not None:
            return layout, {}
        probes = orientation.probes(layout)
        upright = dict(zip(probes, await self._read_each(pixels, layout, probes, turned=False), strict=True))
        if not orientation.in_doubt([read.recognition for read in upright.values()]):
            return layout, upright
        turned = await self._read_each(pixels, layout, probes, turned=True)
        if not orientation.reads_better(
            [read.recognition for read in turned], [read.recognition for read in upright.values()]
        ):
            return layout, upright
        # Found anew, because reading order, corners and angles all hang on which way is up.
        return await self._find_lines(page, pixels, (layout.rotation + 180) % 360), {}

    async def _find_lines(self, page: int, pixels: Page, rotation: int | None) -> Layout:
        try:
            done = await self._worker.run(LayoutJob(pixels, rotation), cost=LAYOUT_COST)
        except Fault as fault:
            raise _on_page(fault, page) from None
        layout = msgspec.msgpack.decode(done.payload, type=Layout)
        limit = self._max_page_lines
        if len(layout.lines) > limit:
            raise too_large(
                "content",
                "PAGE_TOO_MANY_LINES",
                f"page {page} has {len(layout.lines)} lines, more than the limit of {limit}; split the page",
                page=page,
                line_count=len(layout.lines),
                limit_lines=limit,
            )
        return layout

    # --- lines ---

    async def _read_pages(self, tasks: asyncio.TaskGroup) -> None:
        page_before: asyncio.Task[None] | None = None
        for _ in self._plan.pages:
            prepared = await self._prepared.get()
            await self._events.put(PageStarted(prepared.info))
            reading: list[asyncio.Task[LineResult | None]] = []
            for index in range(len(prepared.layout.lines)):
                await self._lines.acquire()
                reading.append(tasks.create_task(self._read_line(prepared, index)))
            page_before = tasks.create_task(self._finish_page(prepared.info, reading, page_before))
            del prepared

    async def _finish_page(
        self,
        info: PageInfo,
        reading: list[asyncio.Task[LineResult | None]],
        page_before: asyncio.Task[None] | None,
    ) -> None:
        lines = [line for task in reading if (line := await task) is not None]
        self._pages.release()  # nobody needs its pixels any more
        if page_before is not None:
            await page_before
        self.tally.page_count += 1
        await self._events.put(PageDone(PageResult(info, tuple(lines))))

    async def _read_line(self, prepared: _Prepared, index: int) -> LineResult | None:
        """Read a line of the page; the caller took a place among the lines in flight, which is given back here."""
        line = prepared.layout.lines[index]
        try:
            read = prepared.known.get(index)
            if read is None:
                read = await self._read(prepared.pixels, line, prepared.layout.rotation)
        finally:
            self._lines.release()
        outcome = self._outcome(read.recognition)
        result = _result(line, index, read) if outcome == "read" else None
        if result is not None:
            self.tally.count(result)
        elif outcome == "blank":
            self.tally.blank_line_count += 1
        else:
            self.tally.dropped_line_count += 1
        await self._events.put(LineDone(prepared.info.page, outcome, result, read.recognition))
        return result

    def _outcome(self, read: Recognition) -> Outcome:
        if read.blank or not read.hypotheses[0].text.strip():
            return "blank"
        return "dropped" if read.confidence < self._plan.min_confidence else "read"

    async def _read_each(self, pixels: Page, layout: Layout, indices: list[int], *, turned: bool) -> list[_Reading]:
        async def one(index: int) -> _Reading:
            line = layout.lines[index]
            rotation = layout.rotation
            if turned:
                line, rotation = orientation.turned(line), (rotation + 180) % 360
            async with self._lines:
                return await self._read(pixels, line, rotation)

        async with asyncio.TaskGroup() as tasks:
            reading = [tasks.create_task(one(index)) for index in indices]
        return [task.result() for task in reading]

    async def _read(self, pixels: Page, line: LayoutLine, rotation: int) -> _Reading:
        loop = asyncio.get_running_loop()
        crop = await loop.run_in_executor(self._executor, crop_line, pixels, line.polygon, rotation)
        work = ReadJob(self._plan.model, crop, self._plan.decoding, partials=False)
        done = await self._worker.run(work, cost=float(self._plan.decoding.beam_width))
        return _Reading(msgspec.msgpack.decode(done.payload, type=Recognition), done.queue_ms, done.engine_ms)


def _result(line: LayoutLine, index: int, read: _Reading) -> LineResult:
    return LineResult(
        order=index + 1,
        block=line.block,
        polygon=line.polygon,
        angle=line.angle,
        detection_score=line.score,
        recognition=read.recognition,
        queue_ms=read.queue_ms,
        engine_ms=read.engine_ms,
    )


def _first(group: BaseExceptionGroup[Fault]) -> Fault:
    """One of the faults that ended a document; the others came at the same moment."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _on_page(fault: Fault, page: int) -> Fault:
    """A fault of the line finder, naming the page."""
    data = fault.data
    if data.reason != "TOO_MANY_LINES":
        return fault
    description = f"page {page}: {data.fields[0].description}" if data.fields else f"page {page} has too many lines"
    numbers = {name: value for name, value in data.metadata.items() if name != "field"}
    return too_large("content", "PAGE_TOO_MANY_LINES", description, **numbers, page=page)
