"""Makes conditions of pictures. Each picture comes at the size it is painted at, and its condition has that size.

All are deterministic. Lengths are in proportion to the shorter side, so that a condition looks alike at every size;
`canny` and `tile` alone count in pixels, for the models they are for were trained so.
"""

import cv2
import numpy as np
import torch
from PIL import Image

from services.diffusion.engine.depth import DepthModel
from services.diffusion.settings import Settings

CANNY_THRESHOLDS = (100, 200)
# What lengths are given for: the side of the pictures that most of these models were trained on.
_USUAL_SIDE = 512
_TILE_FACTOR = 4
_COLOR_CELLS = 8
# Stable Diffusion 3.5's blur ControlNet was trained with a 50 pixel kernel at 1,024 pixels, which is this deviation.
_BLUR_DEVIATION = 7.85 / 1024


class Models:
    """The models that preprocessors run, each loaded when it is first used."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        folders = settings.preprocessor_models
        self.depth = DepthModel(folders["depth"], device) if "depth" in folders else None


def run(name: str, image: Image.Image, models: Models) -> Image.Image:
    """The condition that the named preprocessor makes of an "RGB" picture: "RGB", of the same size.

    Raises Fault (FAILED_PRECONDITION) if the model that it needs cannot be used, KeyError for a name that is not one of
    `preprocessor_table.names`.
    """
    if name == "depth" and models.depth is not None:
        return _grey_picture(models.depth.nearness(image))
    made = _WITHOUT_MODEL[name](np.asarray(image))
    return _grey_picture(made) if made.ndim == 2 else Image.fromarray(made)


def _grey_picture(grey: np.ndarray) -> Image.Image:
    return Image.fromarray(grey).convert("RGB")


def _unit(pixels: np.ndarray) -> float:
    """How many pixels here are one pixel of the usual size."""
    return float(min(pixels.shape[:2]) / _USUAL_SIDE)


def _grey(pixels: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)


def _lab(pixels: np.ndarray) -> np.ndarray:
    """CIE Lab, float32: differences in it are about as large as they look."""
    return cv2.cvtColor(pixels.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)


def _blurred(values: np.ndarray, deviation: float) -> np.ndarray:
    return cv2.GaussianBlur(values, (0, 0), max(deviation, 0.3), borderType=cv2.BORDER_REPLICATE)


def _to_8_bit(strength: np.ndarray, floor: float) -> np.ndarray:
    """Scale strengths so that the strongest are white; `floor` keeps the noise of an empty picture black."""
    white = max(float(np.percentile(strength, 99.5)), floor)
    scaled: np.ndarray = np.rint((strength / white).clip(0, 1) * 255).astype(np.uint8)
    return scaled


def _gradients(pixels: np.ndarray, deviation: float) -> tuple[np.ndarray, np.ndarray]:
    """How steeply Lab changes across and down, float32 [h, w, 3], looked at through a Gaussian."""
    smooth = _blurred(_lab(pixels), deviation)
    return (
        cv2.Sobel(smooth, cv2.CV_32F, 1, 0, scale=1 / 8, borderType=cv2.BORDER_REPLICATE),
        cv2.Sobel(smooth, cv2.CV_32F, 0, 1, scale=1 / 8, borderType=cv2.BORDER_REPLICATE),
    )


def _canny(pixels: np.ndarray) -> np.ndarray:
    return cv2.Canny(_grey(pixels), *CANNY_THRESHOLDS)


def _softedge(pixels: np.ndarray) -> np.ndarray:
    strength = np.zeros(pixels.shape[:2], np.float32)
    for deviation in (1, 2, 4):
        across, down = _gradients(pixels, deviation * _unit(pixels))
        # Times the deviation, a step of the same height is as strong at every scale.
        strength += deviation * _unit(pixels) * np.sqrt((across**2 + down**2).sum(axis=2))
    return _to_8_bit((strength - 2).clip(0), floor=8)


def _lineart(pixels: np.ndarray) -> np.ndarray:
    unit = _unit(pixels)
    lightness = _lab(pixels)[..., 0]
    # A pen's line, and the dark side of a contour, are darker than what is around them; the grain of a photo is too, a
    # little. The root brings out the fainter lines.
    darker = _blurred(lightness, max(3 * unit, 1.5)) - _blurred(lightness, 0.7 * unit)
    return _to_8_bit(np.sqrt((darker - 3).clip(0)), floor=2)


def _scribble(pixels: np.ndarray) -> np.ndarray:
    unit = _unit(pixels)
    deviation = 4 * unit
    across, down = _gradients(pixels, deviation)
    # Of the three channels the one that changes most decides the direction.
    strongest = (across**2 + down**2).argmax(axis=2)[..., None]
    across, down = (np.take_along_axis(part, strongest, axis=2)[..., 0] for part in (across, down))
    peak = float(np.percentile(np.hypot(across, down), 99.5))
    if peak * deviation < 2:  # nothing that an eye would see
        return np.zeros(pixels.shape[:2], np.uint8)
    scale = 1000 / peak  # Canny takes 16-bit gradients
    dx, dy = (np.rint((part * scale).clip(-32000, 32000)).astype(np.int16) for part in (across, down))
    contours = cv2.Canny(dx, dy, 150, 350, L2gradient=True)
    width = max(round(5 * unit), 1)
    return cv2.dilate(contours, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width)))


def _straight_lines(pixels: np.ndarray) -> np.ndarray:
    unit = _unit(pixels)
    # A tighter angle than the detector's own 22.5 degrees, with which a circle is a polygon of long straight lines.
    found = cv2.createLineSegmentDetector(ang_th=12).detect(_grey(pixels))[0]
    drawn = np.zeros(pixels.shape[:2], np.uint8)
    for x1, y1, x2, y2 in np.empty((0, 4)) if found is None else found.reshape(-1, 4):
        if np.hypot(x2 - x1, y2 - y1) >= 32 * unit:
            start, end = (round(float(x1)), round(float(y1))), (round(float(x2)), round(float(y2)))
            cv2.line(drawn, start, end, color=255, thickness=max(round(2 * unit), 1))
    return drawn


def _tile(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    small = (max(width // _TILE_FACTOR, 1), max(height // _TILE_FACTOR, 1))
    return cv2.resize(
        cv2.resize(pixels, small, interpolation=cv2.INTER_AREA), (width, height), interpolation=cv2.INTER_CUBIC
    )


def _blur(pixels: np.ndarray) -> np.ndarray:
    return _blurred(pixels, _BLUR_DEVIATION * min(pixels.shape[:2]))


def _color(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    cell = min(height, width) / _COLOR_CELLS
    grid = (max(round(width / cell), 1), max(round(height / cell), 1))
    return cv2.resize(
        cv2.resize(pixels, grid, interpolation=cv2.INTER_AREA), (width, height), interpolation=cv2.INTER_NEAREST
    )


def _luminance(pixels: np.ndarray) -> np.ndarray:
    return np.rint(_lab(pixels)[..., 0] * 2.55).clip(0, 255).astype(np.uint8)


def _shuffle(pixels: np.ndarray) -> np.ndarray:
    """Every pixel is fetched from where two smooth random maps say, each of which covers the whole picture."""
    height, width = pixels.shape[:2]
    cell = min(height, width) / 3
    # RandomState, because its numbers stay the same in every version of numpy (NEP 19).
    noise = np.random.RandomState(0)
    places = []
    for side in (width, height):
        coarse = noise.rand(round(height / cell) + 1, round(width / cell) + 1).astype(np.float32)
        smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        span = max(smooth.max() - smooth.min(), 1e-6)  # a single pixel has none
        places.append((smooth - smooth.min()) / span * (side - 1))
    return cv2.remap(pixels, places[0], places[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def _threshold(pixels: np.ndarray) -> np.ndarray:
    return cv2.threshold(_grey(pixels), 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[1]


def _invert(pixels: np.ndarray) -> np.ndarray:
    return 255 - pixels


# From uint8 [h, w, 3] to uint8 [h, w] or [h, w, 3].
_WITHOUT_MODEL = {
    "canny": _canny,
    "scribble": _scribble,
    "lineart": _lineart,
    "softedge": _softedge,
    "straight_lines": _straight_lines,
    "tile": _tile,
    "blur": _blur,
    "color": _color,
    "luminance": _luminance,
    "shuffle": _shuffle,
    "threshold": _threshold,
    "invert": _invert,
}
