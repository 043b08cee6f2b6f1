"""What the OCR service talks about. Plain structs: they cross the process boundary and know nothing of gRPC."""

from typing import Literal

import msgspec

from services.kit.device import Device

# Rows one search may use; the contract names the same range.
BEAM_WIDTH_MOST = 16
LENGTH_PENALTY_MOST = 5.0
NO_REPEAT_NGRAM_MOST = 64


class Line(msgspec.Struct, frozen=True):
    """The decoded image of one line of handwriting: 8-bit RGB, row by row from the top, 3 bytes a pixel."""

    width: int
    height: int
    pixels: bytes  # width * height * 3 bytes


class Page(msgspec.Struct, frozen=True):
    """The decoded image of a page: 8-bit RGB, row by row from the top, 3 bytes a pixel."""

    width: int
    height: int
    pixels: bytes  # width * height * 3 bytes


# What torch computes a model's weights with; the int8 ones keep 8-bit weights.
TorchPrecision = Literal["float32", "bfloat16", "float16", "int8_dynamic", "int8_weight_only", "int8_static"]
# The same of any runtime.
Precision = TorchPrecision | Literal["int4_weight_only"]
# What computes a model; all but torch run artifacts of the compiler.
Runtime = Literal["torch", "onnxruntime", "openvino", "tensorrt", "triton"]

# When a beam search ends that has beam_width finished hypotheses: at once, when the best unfinished one cannot become
# better by its present length, or only when it cannot by any length. In transformers: True, False, "never".
EarlyStopping = Literal["first", "heuristic", "never"]


class Decoding(msgspec.Struct, frozen=True):
    """How the text is searched for, every option resolved."""

    beam_width: int  # 1 (greedy) to BEAM_WIDTH_MOST
    hypothesis_count: int  # 1 to beam_width
    length_penalty: float  # finite, -LENGTH_PENALTY_MOST to LENGTH_PENALTY_MOST
    max_new_token_count: int  # 1 to the model's limit
    no_repeat_ngram_size: int = 0  # no run of so many tokens comes twice, 0 to NO_REPEAT_NGRAM_MOST; 0: no rule
    early_stopping: EarlyStopping = "heuristic"


class ReadJob(msgspec.Struct, frozen=True, tag=True):
    """What the engine is asked to do."""

    model: str
    line: Line
    decoding: Decoding
    partials: bool  # whether to send a Partial whenever the best text changes


class EmbedJob(msgspec.Struct, frozen=True, tag=True):
    """Encode images and return the encoder's states."""

    model: str
    lines: tuple[Line, ...]
    pooling: Literal["mean", "cls", "none"]
    dtype: Literal["float32", "float16"]
    normalize: bool  # scale each vector to length 1 (L2)


class LayoutJob(msgspec.Struct, frozen=True, tag=True):
    """Find the lines of a page."""

    page: Page
    rotation: int | None  # 0, 90, 180, 270: the page is known to be turned so; None: find out between 0 and 90


class LoadJob(msgspec.Struct, frozen=True, tag=True):
    """Load a known model; nothing to do when it is loaded so."""

    model: str
    precision: Precision | None = None  # None: the setting's
    runtime: Runtime | None = None  # None: the setting's
    artifact: str = ""  # the id to run from, or its first digits; "": what fits


class UnloadJob(msgspec.Struct, frozen=True, tag=True):
    """Free a model's memory once the jobs that use it are done."""

    model: str


Work = ReadJob | EmbedJob | LayoutJob | LoadJob | UnloadJob


class Partial(msgspec.Struct, frozen=True):
    """The best text so far; under beam search a later one may differ anywhere."""

    text: str
    token_count: int


class Token(msgspec.Struct, frozen=True):
    """One decoded token; the end token is one too, with an empty text."""

    id: int
    text: str  # what it adds to the text; empty for the first parts of a character that several tokens make up
    log_probability: float  # natural logarithm, at most 0


class Hypothesis(msgspec.Struct, frozen=True):
    """One reading of the line."""

    text: str
    log_probability: float  # sum over the tokens
    score: float  # what hypotheses are ranked by
    confidence: float  # geometric mean of the token probabilities, 0 to 1
    tokens: tuple[Token, ...]


class Recognition(msgspec.Struct, frozen=True):
    """What was read, and what it took."""

    hypotheses: tuple[Hypothesis, ...]  # best first, at least one
    truncated: bool  # decoding stopped at max_new_token_count, the text may go on
    decoded_token_count: int  # tokens computed over all rows of the search
    mean_batch_rows: float  # rows that shared its decoding steps, itself included, on average; 0 when blank
    confidence: float  # of the best hypothesis, 0 to 1: calibrated if the model is, else its own confidence
    confidence_calibrated: bool
    repetition_suspected: bool  # the best text goes round in circles
    blank: bool  # the image holds no writing, nothing was decoded


class Embedding(msgspec.Struct, frozen=True):
    """Encoder states in row-major order, little-endian."""

    content: bytes
    dtype: Literal["float32", "float16"]
    shape: tuple[int, ...]  # (images, width), or (images, tokens, width) without pooling


class LayoutLine(msgspec.Struct, frozen=True):
    """One line on a page."""

    # Four corners in pixels of the page as it was given, clockwise, from where the text begins at its top.
    polygon: tuple[tuple[float, float], ...]
    angle: float  # degrees clockwise of the direction of writing from level, on the page as it was given
    score: float  # how sure the detector is, 0 to 1
    block: int  # column or paragraph it belongs to, from 1 in reading order


class Layout(msgspec.Struct, frozen=True):
    """What a page looks like."""

    rotation: int  # degrees the page has to be turned clockwise to be upright: 0, 90, 180 or 270
    skew: float  # degrees clockwise that the writing leans after that
    lines: tuple[LayoutLine, ...]  # in reading order


class Loading(msgspec.Struct, frozen=True):
    """Where a LoadJob stands."""

    stage: Literal["waiting", "reading_weights", "warming"]
    evicted_models: tuple[str, ...] = ()  # unloaded to make room


# Where a model stands, in the words of the contract's ModelState.
ModelState = Literal["loading", "ready", "unloaded"]


class ModelInfo(msgspec.Struct, frozen=True):
    """One loaded model. What LoadJob and UnloadJob end with."""

    name: str
    hardware: str  # label, such as "cpu"
    runtime: str  # such as "torch"
    dtype: str  # such as "float32"
    parameter_count: int
    default_decoding: Decoding
    max_new_token_limit: int
    is_default: bool
    precision: Precision = "float32"
    weight_bytes: int = 0
    languages: tuple[str, ...] = ()  # BCP 47 tags that it declares
    confidence_calibrated: bool = False
    embedding_width: int = 0
    embedding_token_count: int = 0  # states an image, of embedding_width each
    has_class_token: bool = True  # whether the first state stands for the whole image
    artifact: str = ""  # id of the artifact that it runs from; "" for the checkpoint itself
    version: str = ""  # changes when the weights do


class EngineInfo(msgspec.Struct, frozen=True):
    """What the engine says of itself when it is ready, and again whenever a model comes or goes."""

    models: tuple[ModelInfo, ...]  # those that are loaded
    loading: tuple[str, ...] = ()  # names of those that are being loaded or wait for it
    device: Device = Device()

    def find(self, name: str) -> ModelInfo | None:
        """The model of that name, the default one for an empty name; None when there is none."""
        return next((m for m in self.models if (m.name == name if name else m.is_default)), None)
