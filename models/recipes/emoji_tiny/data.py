"""Fetch the emoji sets, choose the names, and rasterize every picture to 64x64 RGB on white.

The sets come from npm (`@iconify-json/*`), which serves the vendors' SVG drawings under one naming scheme, so that the
same name means the same emoji in every style. Nothing else is downloaded.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

#: style word used in prompts -> npm package and version (pinned: the drawings change between releases)
PACKAGES: dict[str, tuple[str, str]] = {
    "noto": ("@iconify-json/noto", "1.2.9"),
    "twemoji": ("@iconify-json/twemoji", "1.2.5"),
    "fluent": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
}
STYLES: tuple[str, ...] = tuple(PACKAGES)
SIZE = 64
#: Two names whose pictures are closer than this (root mean square, 0..1, at 32x32) in any style are the same picture.
SAME_PICTURE_RMS = 0.012


@dataclass(frozen=True)
class EmojiData:
    """All pictures, ``images[style, name]`` as uint8 RGB, and the names as they are written in prompts."""

    names: list[str]
    images: np.ndarray

    def of(self, style: str) -> np.ndarray:
        """The pictures of one style, in the order of `names`."""
        return self.images[STYLES.index(style)]


def fetch(work: Path, style: str) -> dict:
    """Download one icon set with `npm pack` (once) and return its parsed icons.json."""
    package, version = PACKAGES[style]
    folder = work / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"{package.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not archive.exists():
        subprocess.run(["npm", "pack", f"{package}@{version}"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(archive) as tar:
        member = tar.extractfile("package/icons.json")
        if member is None:
            raise FileNotFoundError(f"{archive} holds no icons.json")
        return json.load(member)


def choose_names(sets: list[dict]) -> list[str]:
    """Names every style has, less flags, families, skin tones, and gendered or mirrored variants of a neutral one.

    The left-out ones differ from their neutral base in a few pixels: they would teach the model nothing but confusion.
    """
    shared = set.intersection(*(set(s["icons"]) for s in sets))

    def is_variant(name: str) -> bool:
        if "skin-tone" in name or name.startswith(("flag-", "family")) or name.endswith("-facing-right"):
            return True
        for gender in ("man-", "woman-"):
            if name.startswith(gender):
                rest = name.removeprefix(gender)
                return rest in shared or f"person-{rest}" in shared
        return False

    return sorted(name for name in shared if not is_variant(name))


def rasterize(icon_set: dict, name: str, size: int = SIZE) -> np.ndarray:
    """Draw one icon at 256x256, reduce it to `size` pixels each way and lay it on white."""
    icon = icon_set["icons"][name]
    width = icon.get("width", icon_set.get("width", 16))
    height = icon.get("height", icon_set.get("height", 16))
    left, top = icon.get("left", 0), icon.get("top", 0)
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="256" height="256" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=256, height=256)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    paper = Image.new("RGBA", image.size, (255, 255, 255, 255))
    paper.alpha_composite(image)
    return np.asarray(paper.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


def large(work: Path, names: list[str]) -> np.ndarray:
    """The pictures of `names` in every style at 128x128, (style, name, 128, 128, 3) uint8, drawn once and mapped.

    Twice the size of the model's pictures, so that they can be turned and scaled before they are reduced.
    """
    cache = work / "large.npy"
    if not cache.exists():
        sets = [fetch(work, style) for style in STYLES]
        slugs = [name.replace(" ", "-") for name in names]
        partial = cache.with_name("large.partial.npy")
        np.save(partial, np.stack([np.stack([rasterize(s, slug, 2 * SIZE) for slug in slugs]) for s in sets]))
        partial.replace(cache)
    return np.load(cache, mmap_mode="r")


def thumbnails(images: np.ndarray) -> np.ndarray:
    """Pictures as 32x32 float vectors in 0..1, the form in which pictures are compared."""
    small = images.reshape(*images.shape[:-3], 32, 2, 32, 2, 3).astype(np.float32).mean(axis=(-4, -2)) / 255
    return small.reshape(*images.shape[:-3], -1)


def drop_twins(images: np.ndarray) -> list[int]:
    """Indices of the names to keep when pictures that are (nearly) the same in some style are kept only once."""
    vectors = thumbnails(images)
    keep: list[int] = []
    for i in range(images.shape[1]):
        distance = ((vectors[:, keep] - vectors[:, i : i + 1]) ** 2).mean(-1) ** 0.5
        if not keep or distance.min() > SAME_PICTURE_RMS:
            keep.append(i)
    return keep


def load(work: Path) -> EmojiData:
    """The data set, built on the first call and read from `work` afterwards."""
    cache = work / "data.npz"
    if not cache.exists():
        sets = [fetch(work, style) for style in STYLES]
        slugs = choose_names(sets)
        images = np.stack([np.stack([rasterize(s, slug) for slug in slugs]) for s in sets])
        keep = drop_twins(images)
        names = [slugs[i].replace("-", " ") for i in keep]
        partial = cache.with_name("data.partial.npz")
        np.savez_compressed(partial, names=np.array(names), images=images[:, keep])
        partial.replace(cache)
    with np.load(cache) as stored:
        return EmojiData([str(n) for n in stored["names"]], stored["images"])
