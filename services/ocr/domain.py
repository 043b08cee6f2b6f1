"""What the OCR service talks about. Plain structs: they cross the process boundary and know nothing of gRPC."""

import msgspec

# Rows one search may use; the contract names the same range.
BEAM_WIDTH_MOST = 16
LENGTH_PENALTY_MOST = 5.0


class Line(msgspec.Struct, frozen=True):
    """The decoded image of one line of handwriting: 8-bit RGB, row by row from the top, 3 bytes a pixel."""

    width: int
    height: int
    pixels: bytes  # width * height * 3 bytes


class Decoding(msgspec.Struct, frozen=True):
    """How the text is searched for, every option resolved."""

    beam_width: int  # 1 (greedy) to BEAM_WIDTH_MOST
    hypothesis_count: int  # 1 to beam_width
    length_penalty: float  # finite, -LENGTH_PENALTY_MOST to LENGTH_PENALTY_MOST
    max_new_token_count: int  # 1 to the model's limit


class ReadJob(msgspec.Struct, frozen=True):
    """What the engine is asked to do."""

    model: str
    line: Line
    decoding: Decoding
    partials: bool  # whether to send a Partial whenever the best text changes


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
    mean_batch_rows: float  # rows that shared its decoding steps, itself included, on average


class ModelInfo(msgspec.Struct, frozen=True):
    """One loaded model."""

    name: str
    hardware: str  # label, such as "cpu"
    runtime: str  # such as "torch"
    dtype: str  # such as "float32"
    parameter_count: int
    default_decoding: Decoding
    max_new_token_limit: int
    is_default: bool


class EngineInfo(msgspec.Struct, frozen=True):
    """What the engine says of itself when it is ready."""

    models: tuple[ModelInfo, ...]

    def find(self, name: str) -> ModelInfo | None:
        """The model of that name, the default one for an empty name; None when there is none."""
        return next((m for m in self.models if (m.name == name if name else m.is_default)), None)
