"""Lines of Russian and Ukrainian in handwriting fonts, to show that a Latin reader can be taught another script.

Fonts come from npm (`@fontsource/*`, SIL Open Font License), texts from Faker. The two `UNSEEN` families are for tests:
neither their Cyrillic nor their Latin letters were in any training of handwriting-tiny.
"""

from __future__ import annotations

import argparse
import io
import random
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from faker import Faker
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from .vocabulary import normalise, words

TRAINING = tuple(
    words("caveat bad-script neucha shantell-sans comic-relief playpen-sans amatic-sc great-vibes lobster pacifico")
)
UNSEEN = ("marck-script", "balsamiq-sans")
HEIGHT = 64


@dataclass
class Family:
    """A face for Cyrillic letters and one for the rest: the packages hold them apart."""

    name: str
    faces: dict[str, bytes]
    covers: dict[str, frozenset[int]]

    def part_of(self, character: str) -> str | None:
        """Which of the two has a character; none has blanks."""
        return next((part for part in ("cyrillic", "latin") if ord(character) in self.covers[part]), None)


def fetch(name: str, folder: Path) -> Family:
    """The two faces of a family, downloaded once."""
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(folder.glob(f"fontsource-{name}-[0-9]*.tgz"))
    if not found:
        subprocess.run(["npm", "pack", "--silent", f"@fontsource/{name}"], cwd=folder, check=True, capture_output=True)
        found = sorted(folder.glob(f"fontsource-{name}-[0-9]*.tgz"))
    faces, covers = {}, {}
    with tarfile.open(found[-1]) as tar:
        for part in ("cyrillic", "latin"):
            member = tar.extractfile(f"package/files/{name}-{part}-400-normal.woff2")
            assert member is not None
            face = TTFont(io.BytesIO(member.read()))
            face.flavor = None
            plain = io.BytesIO()
            face.save(plain)
            faces[part], covers[part] = plain.getvalue(), frozenset(face.getBestCmap())
    return Family(name, faces, covers)


def draw(text: str, family: Family, rng: random.Random) -> Image.Image | None:
    """Black text on white with a margin, 64 pixels high; nothing if the family lacks a character."""
    size = rng.choice((36, 42, 48))
    fonts = {part: ImageFont.truetype(io.BytesIO(data), size) for part, data in family.faces.items()}
    image = Image.new("L", (len(text) * size + 4 * size, 3 * size), 255)
    pen = ImageDraw.Draw(image)
    x, gap, tracking = 2.0 * size, size * rng.uniform(0.25, 0.45), size * rng.choice((0.0, rng.uniform(0, 0.08)))
    for word in text.split(" "):
        runs: list[tuple[str, str]] = []
        for character in word:
            part = family.part_of(character)
            if part is None:
                return None
            if runs and runs[-1][0] == part and not tracking:
                runs[-1] = (part, runs[-1][1] + character)
            else:
                runs.append((part, character))
        for part, run in runs:
            pen.text((round(x), 1.9 * size), run, fill=0, font=fonts[part], anchor="ls")
            x += fonts[part].getlength(run) + tracking
        x += gap
    box = image.point(lambda value: 255 - value).getbbox()
    if box is None:
        return None
    margins = [round(rng.uniform(0.02, 0.3) * size) for _ in range(4)]
    line = Image.new("L", (box[2] - box[0] + margins[0] + margins[1], box[3] - box[1] + margins[2] + margins[3]), 255)
    line.paste(image.crop(box), (margins[0], margins[2]))
    return line.resize((max(8, round(line.width * HEIGHT / line.height)), HEIGHT), Image.Resampling.BILINEAR)


def _text(faker: Faker, rng: random.Random) -> str:
    kind = rng.choice(("words", "words", "name", "city", "street_name", "job"))
    if kind == "words":
        return " ".join(faker.words(rng.randint(1, 5)))
    return str(getattr(faker, kind)())


def write(folder: Path, families: list[Family], count: int, seed: int) -> None:
    """A folder of images and ``labels.tsv``, the family as the writer."""
    Faker.seed(seed)
    rng = random.Random(seed)
    fakers = [Faker("ru_RU"), Faker("uk_UA")]
    (folder / "img").mkdir(parents=True, exist_ok=True)
    rows = ["file\ttext\twriter"]
    while len(rows) <= count:
        text = _text(rng.choice(fakers), rng)
        text = normalise(text[:1].upper() + text[1:] if rng.random() < 0.5 else text)
        if not 3 <= len(text) <= 34:
            continue
        family = rng.choice(families)
        image = draw(text, family, rng)
        if image is None:
            continue
        name = f"img/{len(rows):05d}.png"
        image.save(folder / name)
        rows.append(f"{name}\t{text}\t{family.name}")
    (folder / "labels.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def main() -> None:
    """Write OUT/train in the training families and OUT/test in the unseen ones."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--fonts", type=Path, required=True, help="folder for the downloaded packages")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--test-count", type=int, default=200)
    arguments = parser.parse_args()
    write(arguments.out / "train", [fetch(name, arguments.fonts) for name in TRAINING], arguments.count, seed=1)
    write(arguments.out / "test", [fetch(name, arguments.fonts) for name in UNSEEN], arguments.test_count, seed=2)


if __name__ == "__main__":
    main()
