"""Write the two test sets as folders of images and ``labels.tsv``: held-out writers, and lines in unseen fonts."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from .fonts import UNSEEN
from .render import FontShelf, draw_line
from .split import HELD_OUT_WRITERS
from .text import TextSource


def held_out(data: Path, out: Path) -> None:
    """Links to every line of the held-out DHSD writers."""
    (out / "img").mkdir(parents=True, exist_ok=True)
    rows = ["file\ttext\twriter"]
    for row in (data / "dhsd" / "labels.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        file, text, writer = row.split("\t")[:3]
        if writer in HELD_OUT_WRITERS:
            link = out / "img" / Path(file).name
            link.unlink(missing_ok=True)
            link.symlink_to((data / "dhsd" / file).resolve())
            rows.append(f"img/{link.name}\t{text}\t{writer}")
    (out / "labels.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def unseen_fonts(work: Path, out: Path, count: int) -> None:
    """Plain renderings, 8 to 40 characters, in fonts no training line used."""
    (out / "img").mkdir(parents=True, exist_ok=True)
    shelf = FontShelf(work / "fonts", UNSEEN)
    source, rng = TextSource(work / "text", seed=77), random.Random(77)
    rows = ["file\ttext\tfont"]
    while len(rows) <= count:
        text = source.draw()
        if not 8 <= len(text) <= 40:
            continue
        family = UNSEEN[len(rows) % len(UNSEEN)]
        if not all(character in shelf.covers[family] for character in text):
            continue
        line, _ = draw_line(text, family, shelf, rng, plain=True)
        margin = rng.randint(4, 14)
        framed = line.resize((line.width + 2 * margin, line.height + 2 * margin))
        framed.paste(255, (0, 0, framed.width, framed.height))
        framed.paste(line, (margin, margin))
        name = f"img/{len(rows) - 1:03d}-{family}.png"
        framed.save(out / name)
        rows.append(f"{name}\t{text}\t{family}")
    (out / "labels.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def main() -> None:
    """Write both folders."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=300)
    arguments = parser.parse_args()
    held_out(arguments.data, arguments.out / "dhsd_heldout")
    unseen_fonts(arguments.work, arguments.out / "unseen_fonts", arguments.count)


if __name__ == "__main__":
    main()
