"""The two graphs of a TrOCR-style model: what their inputs and outputs are called and mean.

`encoder`, once an image:
    pixel_values  float [images, channels, height, width], preprocessed
 -> states        float [images, patches, encoder width], what the encoder answers
    cross_k_i, cross_v_i  float [images, heads, patches, head size] for each decoder layer i = 0 …: its cross-attention
                  keys and values of the image

`decoder`, one token of every row. A row is a text under way (a beam is one); rows stand at different positions:
    tokens        int64 [rows], the token of each row
    positions     int64 [rows], where it stands in its row, from 0
    past_k_i, past_v_i  float [rows, heads, past, head size]: self-attention keys and values of the row's earlier
                  tokens, at their positions. Places from the row's own position on are masked out; whatever finite
                  numbers they hold, so that the host may pass a buffer that is larger than it is full. past >= 1.
    cross_k_i, cross_v_i  float [images, heads, patches, head size], as the encoder gave them: never one a row
    cross_grid    int64 [images, width]: which row is the n-th query of each image. Images with fewer rows than the
                  widest one are filled up with any row.
    cross_places  int64 [rows]: where each row stands in cross_grid, image * width + n
 -> logits        float32 [rows, vocabulary]
    new_k_i, new_v_i  float [rows, heads, 1, head size]: keys and values of this token, which the host puts at the
                  row's position

Heads, patches and sizes are numbers of the model; `Details` has those that a host needs.
"""

import msgspec

ENCODER = "encoder"
DECODER = "decoder"

PIXELS = "pixel_values"
STATES = "states"
TOKENS = "tokens"
POSITIONS = "positions"
CROSS_GRID = "cross_grid"
CROSS_PLACES = "cross_places"
LOGITS = "logits"

# Axes of the graphs, by name.
IMAGES = "images"
ROWS = "rows"
PAST = "past"
WIDTH = "width"


class Details(msgspec.Struct, frozen=True):
    """Manifest.details of a TrOCR-style model."""

    layer_count: int  # of the decoder
    head_count: int  # of the decoder
    head_size: int
    position_limit: int  # tokens that a row can have at most
    channels: int  # of images: 1 or 3
    image_height: int  # pixels, after preprocessing
    image_width: int
    parameter_count: int
    has_class_token: bool  # whether the first state stands for the whole image
    # Of the checkpoint's weights, as services.ocr.engine.calibration takes it: a calibration says nothing of others.
    weights_sha256: str


def past(layer: int) -> tuple[str, str]:
    """Inputs: a layer's keys and values of earlier tokens."""
    return f"past_k_{layer}", f"past_v_{layer}"


def cross(layer: int) -> tuple[str, str]:
    """Outputs of the encoder, inputs of the decoder: a layer's keys and values of the images."""
    return f"cross_k_{layer}", f"cross_v_{layer}"


def new(layer: int) -> tuple[str, str]:
    """Outputs: a layer's keys and values of the token."""
    return f"new_k_{layer}", f"new_v_{layer}"
