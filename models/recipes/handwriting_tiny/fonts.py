"""Handwriting fonts under open licences, fetched from the npm registry with ``npm pack``.

``TRAINING`` and ``UNSEEN`` are disjoint: an unseen family is never rendered for training, so it measures how well the
model reads a hand it does not know.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import tarfile
from pathlib import Path

from fontTools.ttLib import TTFont

from .vocabulary import CHARACTERS, words

# Joined scripts: drawn as one run only, since shifting single letters would tear the joins.
CURSIVE = frozenset(
    words(
        """
    alex-brush allura bad-script birthstone cedarville-cursive condiment cookie courgette damion
    dancing-script ephesis grand-hotel great-vibes homemade-apple la-belle-aurore licorice marck-script
    meow-script montecarlo ms-madi oooh-baby parisienne sacramento satisfy vibur yellowtail
    """
    )
)

TRAINING = tuple(
    words(
        """
    alex-brush allura annie-use-your-telescope architects-daughter bad-script birthstone caveat caveat-brush
    chilanka comic-neue comic-relief condiment cookie courgette covered-by-your-grace damion dancing-script
    delicious-handrawn ephesis gaegu gloria-hallelujah grand-hotel grandstander great-vibes homemade-apple
    indie-flower itim la-belle-aurore licorice long-cang mansalva meow-script montecarlo ms-madi
    nanum-brush-script nanum-pen-script neucha oooh-baby parisienne permanent-marker playpen-sans poor-story
    reenie-beanie rock-salt sacramento satisfy schoolbell shadows-into-light shantell-sans sriracha
    sue-ellen-francisco swanky-and-moo-moo the-girl-next-door vibur yellowtail yomogi yusei-magic
    zen-kurenaido
    """
    )
)

# Five ordinary hands and two harder, joined ones (the last two).
UNSEEN = ("patrick-hand", "handlee", "kalam", "gochi-hand", "delius", "marck-script", "cedarville-cursive")

# Families published only as Expo packages.
_EXPO = frozenset({"la-belle-aurore", "meow-script"})


def package_of(family: str) -> str:
    """The npm package that holds a family."""
    return f"@expo-google-fonts/{family}" if family in _EXPO else f"@fontsource/{family}"


def _latin_regular(names: list[str]) -> str | None:
    """The member of the archive with the regular Latin face."""
    for ending in ("-latin-400-normal.woff2", "Regular.ttf"):
        for name in sorted(names):
            if name.endswith(ending):
                return name
    return None


def fetch(family: str, folder: Path) -> Path | None:
    """Download one family unless it is there, and return its face as a TrueType file."""
    target = folder / f"{family}.ttf"
    if target.exists():
        return target
    done = subprocess.run(
        ["npm", "pack", "--silent", package_of(family)], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        print(f"{family}: not available ({done.stderr.strip()[:80]})")
        return None
    archive = folder / done.stdout.strip().splitlines()[-1]
    with tarfile.open(archive) as tar:
        member = _latin_regular(tar.getnames())
        data = tar.extractfile(member) if member else None
        if data is None:
            print(f"{family}: no regular Latin face")
            return None
        face = TTFont(io.BytesIO(data.read()))
        for name in tar.getnames():
            if name.upper().endswith(("LICENSE", "LICENSE.TXT", "LICENSE_FONT")):
                text = tar.extractfile(name)
                if text is not None:
                    (folder / f"{family}.LICENSE").write_bytes(text.read())
                break
    face.flavor = None  # plain TrueType loads faster than woff2
    face.save(target)
    archive.unlink()
    return target


def coverage(path: Path) -> frozenset[str]:
    """The characters of our vocabulary that a face can draw with ink (empty glyphs do not count)."""
    face = TTFont(path, lazy=True)
    cmap = face.getBestCmap()
    glyphs = face.get("glyf")
    have = {" "}
    for character in CHARACTERS:
        name = cmap.get(ord(character))
        if name is None or name == ".notdef":
            continue
        if glyphs is not None and glyphs[name].numberOfContours == 0:
            continue
        have.add(character)
    return frozenset(have)


def main() -> None:
    """Fetch every family of the recipe."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for family in TRAINING + UNSEEN:
        path = fetch(family, folder)
        if path is not None:
            missing = [c for c in CHARACTERS if c not in coverage(path)]
            print(f"{family}: {len(CHARACTERS) - len(missing)} characters, lacks {''.join(missing)!r}", flush=True)


if __name__ == "__main__":
    main()
