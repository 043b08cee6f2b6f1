"""The first run of everything is slow, and broken models show."""

import torch
from PIL import Image, ImageDraw

from services.kit.engine_api import Failed
from services.ocr.domain import Decoding, Line, ReadJob
from services.ocr.engine.lane import Lane
from services.runtimes.checkpoints import CheckpointError


@torch.inference_mode()
def warm(lane: Lane) -> None:
    """Read a small line greedily and with beams; raises CheckpointError if that fails."""
    line = _scribble()
    info = lane.model.info
    for width in (1, 1, 4):
        decoding = Decoding(width, 1, 1.0, min(4, info.max_new_token_limit))
        lane.submit("warm-up", ReadJob(info.name, line, decoding, partials=False))
        while lane.busy:
            for event in lane.step():
                if isinstance(event, Failed):
                    raise CheckpointError(f"{info.name} fails on a first line: {event.fault.message}")


def _scribble() -> Line:
    """A zigzag on white paper: an empty line would be answered without any decoding."""
    image = Image.new("RGB", (256, 64), "white")
    points = [(x, 16 + 32 * (x // 16 % 2)) for x in range(24, 232, 16)]
    ImageDraw.Draw(image).line(points, fill="black", width=3)
    return Line(image.width, image.height, image.tobytes())
