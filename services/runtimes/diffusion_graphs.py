"""The graphs of a diffusion model: what their inputs and outputs are called and mean.

One graph a network, in the numbers that diffusers passes between them. All float inputs and outputs are float32 in the
exported graphs; a graph of 16 bits says so in its ports.

`text_encoder`, `text_encoder_2`, `text_encoder_3`, a prompt a row:
    input_ids          int64 [batch, tokens]; tokens is a number for CLIP, an axis for T5
 -> last_hidden_state  float [batch, tokens, channels], after the last layer norm
    hidden_states      float [layers + 1, batch, tokens, channels], CLIP: before the first layer and after each, without
                       the last layer norm
    normed_states      the same with the last layer norm on each, which Stable Diffusion's clip_skip takes
    pooled             float [batch, channels], CLIP: text_embeds of a class that projects, else pooler_output

`unet`, one evaluation:
    sample             float [batch, channels, height, width], noisy latents, and mask channels of inpainting models
    timestep           float32 [batch]; has to stay float32: 16 bits do not hold the numbers to 1000
    encoder_hidden_states  float [batch, tokens, channels]
    timestep_cond      float [batch, channels], for models that are conditioned on their guidance scale (LCM)
    text_embeds, time_ids  float [batch, …], SDXL's added conditions
    down_residual_i, mid_residual  float [batch, channels, rows, columns], what ControlNets add to the skip connections;
                       zeros without any
 -> prediction         float [batch, channels, height, width]

`transformer` of Stable Diffusion 3: hidden_states [batch, channels, height, width], encoder_hidden_states
[batch, tokens, channels], pooled_projections [batch, channels], timestep float32 [batch]
 -> prediction         like hidden_states
`transformer` of Flux: hidden_states [batch, patches, channels], encoder_hidden_states, pooled_projections, timestep and
guidance (float32 [batch], in thousandths as the pipelines pass them; guidance for models that are distilled for it),
img_ids float32 [patches, 3], txt_ids float32 [tokens, 3] -> prediction like hidden_states.

`vae_encoder`:  pixels float [batch, 3, pixel_height, pixel_width] in -1 to 1 -> moments float
                [batch, 2 * latent channels, height, width]: mean and log-variance; drawing from them is the host's
`vae_decoder`:  latents float [batch, latent channels, height, width] -> pixels [batch, 3, 8 * height, 8 * width]

`controlnet`:   sample, timestep, encoder_hidden_states, text_embeds, time_ids as for `unet`; condition float
                [batch, channels, 8 * height, 8 * width] in 0 to 1 -> down_residual_i, mid_residual, of strength 1

Residuals are inputs of every unet though most evaluations have none, since ONNX knows no optional inputs and a second
graph would hold the weights twice. Adding zeros to two rows of Stable Diffusion 1.5 at 512x512 took 0.03 % of the
unet's time on a CPU, and the zeros take some 55 MB. For transformers it would not be cheap: Flux has 57 residuals of a
whole hidden state, gigabytes of zeros; so compiled transformers go without ControlNets.
"""

from collections.abc import Mapping

import msgspec

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
UNET = "unet"
TRANSFORMER = "transformer"
VAE_ENCODER = "vae_encoder"
VAE_DECODER = "vae_decoder"
CONTROLNET = "controlnet"

INPUT_IDS = "input_ids"
LAST_HIDDEN_STATE = "last_hidden_state"
HIDDEN_STATES = "hidden_states"
NORMED_STATES = "normed_states"
POOLED = "pooled"
SAMPLE = "sample"
TIMESTEP = "timestep"
TIMESTEP_COND = "timestep_cond"
ENCODER_HIDDEN_STATES = "encoder_hidden_states"
TEXT_EMBEDS = "text_embeds"
TIME_IDS = "time_ids"
POOLED_PROJECTIONS = "pooled_projections"
IMG_IDS = "img_ids"
TXT_IDS = "txt_ids"
GUIDANCE = "guidance"
MID_RESIDUAL = "mid_residual"
PREDICTION = "prediction"
PIXELS = "pixels"
MOMENTS = "moments"
LATENTS = "latents"
CONDITION = "condition"

# Axes of the graphs, by name. Height and width count latents.
BATCH = "batch"
TOKENS = "tokens"
HEIGHT = "height"
WIDTH = "width"
PIXEL_HEIGHT = "pixel_height"
PIXEL_WIDTH = "pixel_width"
PATCHES = "patches"


class Details(msgspec.Struct, frozen=True):
    """Manifest.details of a diffusion model or a ControlNet."""

    parameter_count: int  # of the exported networks
    pixels_a_latent: int  # along one side; 0 for a ControlNet


def halved(axis: str, times: int) -> str:
    """The axis of half a picture's height or width, rounded up, so many times: "height_2"."""
    return f"{axis}_{times}"


def halved_size(size: int, times: int) -> int:
    """Half of it, rounded up, so many times."""
    return ((size - 1) >> times) + 1


def size_of(axis: str, sizes: Mapping[str, int]) -> int:
    """The size of an axis, or of one that is another halved. sizes: by name. Raises KeyError for any other axis."""
    if axis in sizes:
        return sizes[axis]
    name, _, times = axis.rpartition("_")
    if name not in sizes or not times.isdecimal():
        raise KeyError(axis)
    return halved_size(sizes[name], int(times))


def down_residual(index: int) -> str:
    """Input of a unet, output of a controlnet: what is added to this skip connection."""
    return f"down_residual_{index}"
