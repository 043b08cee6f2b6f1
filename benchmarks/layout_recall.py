"""Share of the lines of rendered handwritten pages that are found, by the kind of page.

A line counts as found when an outline of its own overlaps its ink's box by IoU >= 0.5, one to one. Pages are rendered
in the fonts of the repository, or in those of the folder that INKWELL_BENCH_FONTS names. `order` counts neighbours in
reading order that came the other way round, `extra` outlines that are no line.
"""

import os
import statistics
import time
from dataclasses import replace
from pathlib import Path

from benchmarks._bars import Bar, at_least
from services.ocr.domain import Page
from services.ocr.engine.layout import Detector, find_lines
from tests.support import pages
from tests.support.pages import PageSpec

PAGES = 6  # of each kind
KINDS = {
    "plain": PageSpec(),
    "ruled": PageSpec(paper="lines"),
    "grid": PageSpec(paper="grid", rules=(120, 130, 150)),
    "margin": PageSpec(paper="margin"),
    "rotated": PageSpec(degrees=10.0),
    "rotated_ruled": PageSpec(degrees=-10.0, paper="margin", desk=(90, 70, 50)),
    "two_columns": PageSpec(columns=2, lines=50),
    "two_columns_ruled": PageSpec(columns=2, lines=51, heading=True, paper="lines"),
    "two_columns_rotated": PageSpec(columns=2, lines=51, heading=True, paper="lines", degrees=7.0),
    "close_lines": PageSpec(spacing=1.2, paper="lines"),
    "unsteady": PageSpec(wobble=0.06, indent=True, ragged=0.7, spacing=2.0),
    "photo": PageSpec(
        width=3000, height=4000, paper="margin", degrees=-4.0, shadow=0.6, noise=8, jpeg=50, desk=(90, 70, 50)
    ),
    "100_dpi": PageSpec(width=827, height=1169, paper="lines", jpeg=60),
    "on_its_side": PageSpec(turned=270, paper="lines", degrees=3.0),
}


def run() -> dict[str, Bar]:
    """Bars: the share of lines found, by kind of page."""
    folder = os.environ.get("INKWELL_BENCH_FONTS")
    fonts = pages.font_files(Path(folder)) if folder else pages.font_files()
    detector = Detector.load(threads=1)
    bars: dict[str, Bar] = {}
    print(f"  {len(fonts)} fonts, {PAGES} pages of each kind, one thread")
    for kind_number, (kind, spec) in enumerate(KINDS.items()):
        lines = found = extra = order = 0
        overlaps: list[float] = []
        seconds: list[float] = []
        for number in range(PAGES):
            # Steps through the fonts such that kinds do not all get the same few.
            font = fonts[(kind_number * PAGES + number) * 7 % len(fonts)]
            rendered = pages.render(replace(spec, fonts=(font,)), number)
            page = Page(rendered.image.width, rendered.image.height, rendered.image.tobytes())
            began = time.process_time()
            layout = find_lines(page, detector)
            seconds.append(time.process_time() - began)
            truth, got = [line.polygon for line in rendered.lines], [line.polygon for line in layout.lines]
            matched = pages.match(truth, got)
            places = [matched[line] for line in sorted(matched)]
            lines += len(truth)
            found += len(matched)
            extra += len(got) - len(matched)
            order += sum(a > b for a, b in zip(places, places[1:], strict=False))
            overlaps += [pages.overlap(truth[line], got[place]) for line, place in matched.items()]
        print(
            f"  {kind:20} found {found}/{lines}  mean IoU {statistics.mean(overlaps):.2f}  extra {extra}  order {order}"
            f"  CPU {statistics.median(seconds):.2f} s a page",
            flush=True,
        )
        bars[kind] = at_least(found / lines, 0.90)
    return bars
