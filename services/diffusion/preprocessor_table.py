"""The steps that make a condition of a picture. Plain data: the front lists them without the libraries they need."""

from dataclasses import dataclass

from services.diffusion.settings import Settings


@dataclass(frozen=True)
class PreprocessorEntry:
    """One name of the table. needs_model: it is there only where the settings say which model it runs."""

    name: str
    description: str
    needs_model: bool = False


_ENTRIES = (
    PreprocessorEntry("canny", "Thin white edges on black (OpenCV's Canny at 100 and 200); for canny controls."),
    PreprocessorEntry("scribble", "The main contours as thick white strokes on black; for scribble controls."),
    PreprocessorEntry("lineart", "Outlines and inner lines as fine white strokes on black; for lineart controls."),
    PreprocessorEntry("softedge", "Edges as soft as they are, white on black; for softedge, HED and PiDiNet controls."),
    PreprocessorEntry("straight_lines", "Straight edges only, white on black, as in buildings; for MLSD controls."),
    PreprocessorEntry("depth", "How near everything is, white the nearest; for depth controls.", needs_model=True),
    PreprocessorEntry("tile", "The picture without detail finer than four pixels; for tile controls."),
    PreprocessorEntry("blur", "The picture out of focus; for blur controls."),
    PreprocessorEntry("color", "Mean colours on a coarse grid, eight cells to the shorter side; for colour adapters."),
    PreprocessorEntry("luminance", "The lightness alone, as grey; for recolour controls."),
    PreprocessorEntry("shuffle", "Colours and textures without their shapes, swirled about; for shuffle controls."),
    PreprocessorEntry("threshold", "Black and white, parted where it tells most; for drawings and QR controls."),
    PreprocessorEntry("invert", "The negative: makes black lines on white the white on black that line controls want."),
)


def descriptions(settings: Settings) -> dict[str, str]:
    """The preprocessors that run here: the name that a control gives, and one sentence on it."""
    configured = settings.preprocessor_models
    return {entry.name: entry.description for entry in _ENTRIES if not entry.needs_model or entry.name in configured}


def names(settings: Settings) -> tuple[str, ...]:
    """The names that a control may give as its preprocessor."""
    return tuple(descriptions(settings))
