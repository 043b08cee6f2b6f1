"""The network that says which pixels of a page are text: PP-OCRv6's small detector, on ONNX Runtime.

Its weights lie in the wheel of `rapidocr`; of that package only the file is used, nothing is imported from it and
nothing is ever downloaded. Preprocessing and thresholds are those of its `config.yaml`.
"""

import importlib.util
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import onnxruntime

WEIGHTS = Path("models") / "PP-OCRv6_det_small.onnx"
TILE = 1312  # side of the largest image that goes through it at once
OVERLAP = 96
STRIDE = 32  # the network halves five times, so both sides must be multiples of it

Rgb = npt.NDArray[np.uint8]
TextMap = npt.NDArray[np.float32]


class DetectorMissing(Exception):
    """The detector's weights are not installed."""


class Detector:
    """A loaded detector. Calls may come from one thread at a time."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self._input = session.get_inputs()[0].name

    @classmethod
    def load(cls, threads: int) -> "Detector":
        """Load the weights in a fraction of a second; computes with so many threads, at least 1.

        Raises DetectorMissing when the package `rapidocr` is not installed or lacks the file.
        """
        spec = importlib.util.find_spec("rapidocr")
        folders = list(spec.submodule_search_locations or []) if spec else []
        path = next((found for folder in folders if (found := Path(folder) / WEIGHTS).is_file()), None)
        if path is None:
            raise DetectorMissing(
                f"the line detector needs {WEIGHTS.name} of the package rapidocr: pip install rapidocr"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Its threads must sleep while they wait: lines are read on the same cores meanwhile.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # An arena keeps the largest page's memory for ever.
        options.enable_cpu_mem_arena = False
        options.log_severity_level = 3
        cv2.setNumThreads(threads)
        return cls(onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]))

    def text_map(self, image: Rgb) -> TextMap:
        """How likely each pixel lies in the core of a line of text.

        `image` is [height, width, 3] 8-bit RGB of any size from 1x1; answers [height, width], 0 to 1. The cores are
        narrower than the lines: the network was taught with boxes shrunk so that neighbours stay apart. Large images go
        through it in overlapping tiles, so that memory has a bound (some 0.7 GB).
        """
        height, width = image.shape[:2]
        if height * width <= TILE * TILE:
            return self._run(image)
        answer = np.zeros((height, width), np.float32)
        for top, bottom in _spans(height):
            for left, right in _spans(width):
                tile = self._run(image[top:bottom, left:right])
                # What lies near a cut is seen better by the neighbour, except at the image's own edges.
                y, x = (OVERLAP // 2 if top else 0), (OVERLAP // 2 if left else 0)
                answer[top + y : bottom, left + x : right] = tile[y:, x:]
        return answer

    def _run(self, image: Rgb) -> TextMap:
        height, width = image.shape[:2]
        below, beside = -height % STRIDE, -width % STRIDE
        # Paper, because streaks drawn out of the last row look like writing.
        paper = [float(value) for value in np.median(image.reshape(-1, 3)[:: max(1, image.size // 30_000)], axis=0)]
        padded = cv2.copyMakeBorder(image, 0, below, 0, beside, cv2.BORDER_CONSTANT, value=paper)
        # Blue first, as the network was taught.
        pixels = padded[:, :, ::-1].astype(np.float32) * np.float32(1 / 127.5) - np.float32(1)
        batch = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])
        answer: TextMap = self._session.run(None, {self._input: batch})[0]
        return answer[0, 0, :height, :width]


def _spans(length: int) -> list[tuple[int, int]]:
    """Start and end of overlapping tiles over a side."""
    count = max(1, -(-(length - OVERLAP) // (TILE - OVERLAP)))
    step = -(-(length - OVERLAP) // count)
    return [(number * step, min(length, (number + 1) * step + OVERLAP)) for number in range(count)]
