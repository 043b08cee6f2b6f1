"""What happens to pictures and masks before they are painted on and after.

A mask is "L": 255 where to repaint, 0 where the picture stays exactly as it is, between them a soft edge.
"""

import math

import cv2
import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps

from services.diffusion.domain import MaskFill, Outpaint, Pixels, Upscaler
from services.diffusion.inputs import REPAINT_FROM
from services.kit.faults import Fault, invalid_field

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the picture; may reach beyond its edges

GREY = 128

_RESAMPLING = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}


def to_image(pixels: Pixels) -> Image.Image:
    """The decoded picture as Pillow's, of the same mode."""
    return Image.frombytes(pixels.mode, (pixels.width, pixels.height), pixels.content)


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scale until width x height is covered, and cut off evenly what stands over. Masks take the same transform."""
    return ImageOps.fit(image, (width, height), _filter_for(image))


def _filter_for(image: Image.Image) -> Image.Resampling:
    # Lanczos rings at hard edges: around a mask that would be specks of repainting.
    return Image.Resampling.BILINEAR if image.mode == "L" else Image.Resampling.LANCZOS


# --- masks ---


def prepare_mask(mask: Image.Image, blur_px: int, *, inverted: bool) -> Image.Image:
    """The mask with its edge softened by a Gaussian of `blur_px` pixels standard deviation; for `paste_back`."""
    if inverted:
        mask = ImageOps.invert(mask)
    return mask.filter(ImageFilter.GaussianBlur(blur_px)) if blur_px else mask


def hard_mask(mask: Image.Image, cell: int) -> Image.Image:
    """The mask as pipelines want it: 255 or 0, and all 255 in each block of `cell` x `cell` with anything to repaint.

    cell: pixels a latent; width and height are multiples of it. Pipelines look at one pixel of each cell only and would
    leave out what is smaller; `paste_back` gives back to the picture what is too much.

    Raises Fault (INVALID_ARGUMENT) when scaling and softening have left nothing to repaint.
    """
    hard = np.asarray(mask) >= REPAINT_FROM
    if not hard.any():
        raise _nothing_left(mask)
    rows, columns = mask.height // cell, mask.width // cell
    cells = hard.reshape(rows, cell, columns, cell).any(axis=(1, 3))
    return Image.fromarray(cells.repeat(cell, axis=0).repeat(cell, axis=1).astype(np.uint8) * 255)


def _nothing_left(mask: Image.Image) -> Fault:
    return invalid_field(
        "inpaint.mask",
        f"nothing is left of it at {mask.width}x{mask.height} pixels with its edge softened; take a larger mask or a"
        " smaller inpaint.blur_px",
        reason="MASK_EMPTY",
    )


def crop_region(mask: Image.Image, padding_px: int, width: int, height: int) -> Box:
    """The part of the picture to cut out and paint at width x height: all of the prepared mask and the padding around.

    The box has the proportions of width x height, to the pixel that they are rounded to, and is moved into the picture.
    Only where the picture is too narrow or too low for it does it reach beyond, evenly. Raises Fault as `hard_mask`.
    """
    bounds = mask.getbbox()
    if bounds is None:
        raise _nothing_left(mask)
    left, right = max(bounds[0] - padding_px, 0), min(bounds[2] + padding_px, mask.width)
    top, bottom = max(bounds[1] - padding_px, 0), min(bounds[3] + padding_px, mask.height)
    scale = max((right - left) / width, (bottom - top) / height)
    box_width = max(math.ceil(scale * width - 1e-6), right - left)
    box_height = max(math.ceil(scale * height - 1e-6), bottom - top)
    left, right = _place(left, right, box_width, mask.width)
    top, bottom = _place(top, bottom, box_height, mask.height)
    return left, top, right, bottom


def _place(low: int, high: int, length: int, most: int) -> tuple[int, int]:
    """Grow low..high to `length`, evenly, and move it into 0..most; around all of it when it is longer."""
    even = low - (length - (high - low)) // 2
    start = min(max(even, 0), most - length) if length <= most else -((length - most) // 2)
    return start, start + length


def cut(image: Image.Image, box: Box, width: int, height: int) -> Image.Image:
    """The box of a picture or mask, scaled to width x height; the picture is mirrored where the box reaches beyond."""
    inside = _clip(box, image.size)
    left, right = _share(box[0], box[2], inside[0], inside[2], width)
    top, bottom = _share(box[1], box[3], inside[1], inside[3], height)
    scaled = image.resize((right - left, bottom - top), _filter_for(image), box=inside)
    if scaled.size == (width, height):
        return scaled
    return Image.fromarray(
        cv2.copyMakeBorder(np.asarray(scaled), top, height - bottom, left, width - right, borderType=cv2.BORDER_REFLECT)
    )


def paste_back(original: Image.Image, painted: Image.Image, mask: Image.Image, box: Box | None = None) -> Image.Image:
    """Lay what was painted on the original through the mask, which is as large as the original.

    box: where `painted` belongs, as `crop_region` gave it; None when it is as large as the original. Pixels whose mask
    is 0 stay exactly the original's, those of 255 are exactly the painted ones, between them the two are blended.
    """
    if box is not None:
        inside = _clip(box, original.size)
        left, right = _share(box[0], box[2], inside[0], inside[2], painted.width)
        top, bottom = _share(box[1], box[3], inside[1], inside[3], painted.height)
        whole = original.copy()
        scaled = painted.resize(
            (inside[2] - inside[0], inside[3] - inside[1]), Image.Resampling.LANCZOS, box=(left, top, right, bottom)
        )
        whole.paste(scaled, inside[:2])
        painted = whole
    return Image.composite(painted, original, mask)


def _clip(box: Box, size: tuple[int, int]) -> Box:
    """The part of the box inside a picture of that size."""
    return max(box[0], 0), max(box[1], 0), min(box[2], size[0]), min(box[3], size[1])


def _share(low: int, high: int, inner_low: int, inner_high: int, length: int) -> tuple[int, int]:
    """Where inner_low..inner_high comes to lie when low..high is scaled to 0..length; one pixel at least."""
    scale = length / (high - low)
    start = min(round((inner_low - low) * scale), length - 1)
    return start, max(round((inner_high - low) * scale), start + 1)


# --- what stands in the hole before it is painted ---


def fill(image: Image.Image, mask: Image.Image, kind: MaskFill, seed: int) -> Image.Image:
    """The picture with something else under the mask, blended in at soft edges; "original" leaves it as it is."""
    match kind:
        case "original":
            return image
        case "surroundings":
            filling = _surroundings(image, mask)
        case "noise":
            filling = _noise(image.size, seed)
        case "grey":
            filling = Image.new("RGB", image.size, (GREY, GREY, GREY))
    return Image.composite(filling, image, mask)


def _noise(size: tuple[int, int], seed: int) -> Image.Image:
    # RandomState, because its numbers stay the same in every version of numpy; those of default_rng may not (NEP 19).
    width, height = size
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8))


def _surroundings(image: Image.Image, mask: Image.Image) -> Image.Image:
    """Colours for the hole, from what is around it; middle grey where there is nothing around."""
    known = 1 - np.asarray(mask, dtype=np.float32) / 255
    spread = _pull_push(np.asarray(image, dtype=np.float32), known)
    return Image.fromarray(np.rint(spread).clip(0, 255).astype(np.uint8))


def _pull_push(colours: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Fill unknown pixels from ever coarser means of the known ones (pull-push: Gortler et al., The Lumigraph, 1996).

    colours: float32 [h, w, 3]; known: float32 [h, w], 0 (not) to 1 (fully). Returns float32 [h, w, 3].
    """
    height, width = known.shape
    if known.min() == 1:
        return colours
    if height == width == 1:
        return _blend(known, colours, np.full_like(colours, GREY))
    half = ((width + 1) // 2, (height + 1) // 2)
    weighted = cv2.resize(np.dstack([colours * known[..., None], known]), half, interpolation=cv2.INTER_AREA)
    weight = weighted[..., 3]
    coarse = weighted[..., :3] / np.maximum(weight, 1e-6)[..., None]
    # A coarse pixel is known as well as the four under it are together, so that every level halves the hole.
    filled = _pull_push(coarse, np.minimum(weight * 4, 1))
    fine = cv2.resize(filled, (width, height), interpolation=cv2.INTER_LINEAR)
    return _blend(known, colours, fine)


def _blend(known: np.ndarray, colours: np.ndarray, others: np.ndarray) -> np.ndarray:
    share = known[..., None]
    blended: np.ndarray = share * colours + (1 - share) * others
    return blended


# --- beyond the edges ---


def outpaint_canvas(image: Image.Image, outpaint: Outpaint, seed: int) -> tuple[Image.Image, Image.Image]:
    """The picture on its grown canvas, the new area filled, and the mask of that area.

    The mask is 255 in all of the new area and fades to 0 over `blur_px` pixels of the old one, counted from the edges
    that grow; all beyond that stays exactly as it is.
    """
    if outpaint.fill == "original":
        raise ValueError("beyond its edges a picture has no original")
    left, top = outpaint.left_px, outpaint.top_px
    width, height = image.width + left + outpaint.right_px, image.height + top + outpaint.bottom_px
    across = _fade(image.width, left, outpaint.right_px, outpaint.blur_px)
    down = _fade(image.height, top, outpaint.bottom_px, outpaint.blur_px)
    mask = Image.fromarray(np.maximum(across[None, :], down[:, None]))

    canvas = Image.new("RGB", (width, height), (GREY, GREY, GREY))
    canvas.paste(image, (left, top))
    # The old picture is under the soft edge, so nothing of it need be filled.
    hole = Image.new("L", (width, height), 255)
    hole.paste(0, (left, top, left + image.width, top + image.height))
    return fill(canvas, hole, outpaint.fill, seed), mask


def _fade(length: int, before: int, after: int, blur_px: int) -> np.ndarray:
    """The mask along one side, uint8 [before + length + after]: smooth steps down from the ends that grow."""
    position = np.arange(length)
    fade = np.zeros(length)
    for grown, distance in ((before, position + 0.5), (after, length - position - 0.5)):
        if grown and blur_px:
            rest = np.clip(1 - distance / blur_px, 0, 1)
            fade = np.maximum(fade, rest * rest * (3 - 2 * rest))
    inner = np.rint(fade * 255).astype(np.uint8)
    return np.concatenate([np.full(before, 255, np.uint8), inner, np.full(after, 255, np.uint8)])


# --- to a higher size ---


def upscale(image: Image.Image, width: int, height: int, upscaler: Upscaler) -> Image.Image:
    """The picture at width x height by one of the upscalers that work on pictures."""
    return image.resize((width, height), _RESAMPLING[upscaler])


def upscale_latents(latents: torch.Tensor, upscaler: Upscaler, rows: int, columns: int) -> torch.Tensor:
    """Latents [n, channels, rows, columns], of the type they came in, by "latent" (bilinear) or "latent_nearest"."""
    mode = {"latent": "bilinear", "latent_nearest": "nearest-exact"}[upscaler]
    # In float32: not every device interpolates 16-bit numbers.
    return torch.nn.functional.interpolate(latents.float(), size=(rows, columns), mode=mode).to(latents.dtype)
