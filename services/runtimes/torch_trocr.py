"""Runs a VisionEncoderDecoderModel with a TrOCR decoder on torch, many rows at different positions in one step.

The weights and layers are those of transformers; the forward pass through the decoder is our own, because the
library's takes one position for the whole batch. What it computes for a row is what the library computes for that row
alone, up to the last bits of floating point.
"""

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import TrOCRForCausalLM, VisionEncoderDecoderModel

from services.runtimes import int8_folder, tuning
from services.runtimes.checkpoints import CheckpointError, read_config, require_weights
from services.runtimes.hardware import Hardware
from services.runtimes.precision import Precision, apply_precision, parameter_count, refusal, weight_bytes
from services.runtimes.torch_speed import can_pack, pack_linears, packs_many_rows
from services.runtimes.trocr_rows import Encoded, Step

# A head that no reading needs: original TrOCR checkpoints come without it.
_UNUSED_WEIGHTS = ("encoder.pooler.",)
_HEAD = "decoder.output_projection.weight"


def choose_precision(name: Precision | Literal["auto"], hardware: Hardware) -> Precision:
    """The precision named; for "auto" float32 on cpu and the best 16-bit type elsewhere."""
    if name != "auto":
        return name
    if hardware.label == "cpu":
        return "float32"
    types: tuple[Precision, ...] = ("bfloat16", "float16", "float32")
    return next(precision for precision in types if not refusal(precision, hardware))


def load(
    folder: Path,
    *,
    device: str,
    precision: Precision,
    hardware: Hardware,
    allow_pickled_weights: bool = False,
) -> VisionEncoderDecoderModel:
    """Load weights for inference; raises CheckpointError for anything but a whole TrOCR-style model.

    May run on any thread while other models compute.
    """
    config = read_config(folder)
    require_weights(folder, allow_pickled_weights=allow_pickled_weights)
    try:
        # Another type than float32 would be the default of every thread while the library builds the model.
        if int8_folder.is_int8(config):
            model, report = int8_folder.load(folder)
        else:
            model, report = VisionEncoderDecoderModel.from_pretrained(
                folder,
                use_safetensors=None if allow_pickled_weights else True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
            )
    except (MemoryError, torch.OutOfMemoryError, CheckpointError):
        raise
    except Exception as error:  # a folder can be broken in any way, and the library raises whatever it met
        raise CheckpointError(f"{folder}: cannot be loaded: {type(error).__name__}: {error}") from error
    missing = {key for key in report["missing_keys"] if not key.startswith(_UNUSED_WEIGHTS)}
    if _HEAD in missing and config["decoder"].get("tie_word_embeddings", True):
        # Older folders share these two in the decoder's configuration only, and the file holds them once.
        model.decoder.output_projection.weight = model.decoder.model.decoder.embed_tokens.weight
        missing.remove(_HEAD)
    if missing:
        # The library would fill them with random numbers and go on.
        raise CheckpointError(f"{folder}: {len(missing)} weights are missing, first {min(missing)}")
    if report["mismatched_keys"]:
        name, found, wanted = min(report["mismatched_keys"])
        raise CheckpointError(
            f"{folder}: {len(report['mismatched_keys'])} weights have another shape than config.json says, first"
            f" {name}: {list(found)} and not {list(wanted)}"
        )
    if device.partition(":")[0] != hardware.device.partition(":")[0]:
        # The settings name a device that is not the best one here.
        hardware = replace(hardware, label=device.partition(":")[0], device=device)
    return apply_precision(model.eval(), precision, hardware).to(device)


class TrocrModel:
    """The two networks of one model, for inference: trocr_rows.Networks."""

    runtime = "torch"
    reads_whole_past = False
    row_limit = image_limit = sys.maxsize

    def __init__(self, model: VisionEncoderDecoderModel, *, compile_for: Hardware | None = None) -> None:
        """Takes the model over: on a processor its linear layers are replaced by faster ones.

        compile_for: hardware that torch.compile makes the encoder faster for; None leaves it eager. The decoder always
        is: its cache grows with every token.

        Raises CheckpointError if the decoder is not TrOCR's.
        """
        if not isinstance(model.decoder, TrOCRForCausalLM):
            raise CheckpointError(
                f"the decoder is a {type(model.decoder).__name__}; this service runs VisionEncoderDecoderModel"
                " folders whose decoder is TrOCRForCausalLM"
            )
        model.eval()
        config = model.decoder.config
        # The weights are counted and asked for their device and type before they are packed.
        self.device = model.decoder.output_projection.weight.device
        self.dtype = model.decoder.output_projection.weight.dtype
        self.parameter_count = parameter_count(model)
        self.weight_bytes = weight_bytes(model)
        if can_pack(self.device):
            # After apply_precision: what that has quantized stays.
            pack_linears(model.decoder)
            # torch.compile lays out the weights itself, and does not know packed ones.
            if packs_many_rows() and compile_for is None:
                pack_linears(model)
        self._encoder = model.encoder
        if compile_for is not None:
            tuning.compile_forward(self._encoder, compile_for)
        self._projection: nn.Module = getattr(model, "enc_to_dec_proj", nn.Identity())
        self._head = model.decoder.output_projection
        decoder = model.decoder.model.decoder
        self._embed_tokens = decoder.embed_tokens
        self._embedding_norm: nn.Module = decoder.layernorm_embedding or nn.Identity()
        self._layers: list[Any] = list(decoder.layers)
        self.layer_count = len(self._layers)
        self.head_count: int = config.decoder_attention_heads
        self.head_size: int = config.hidden_size // config.decoder_attention_heads
        self.channels = int(getattr(model.config.encoder, "num_channels", 3))
        self.position_limit: int = config.max_position_embeddings
        # Vision transformers of all families call it so; encoders that pool instead (Swin) have none.
        self.has_class_token = any(name.endswith("cls_token") for name, _ in model.encoder.named_parameters())
        self._pad_id: int = config.pad_token_id if config.pad_token_id is not None else -1
        self._positions, self._first_position = position_table(decoder, config, self.device, self.dtype)
        self._learned_positions: bool = config.use_learned_position_embeddings

    def states(self, pixel_values: Tensor) -> Tensor:
        """Preprocessed images float [images, channels, height, width] to what the encoder answers for them.

        The result is [images, tokens, width of the encoder].
        """
        pixels = pixel_values.to(self.device, self.dtype)
        states: Tensor = self._encoder(pixel_values=pixels, return_dict=True)[0]
        return states

    def encode(self, pixel_values: Tensor) -> Encoded:
        """Preprocessed images as in `states` to what the decoder looks at."""
        seen: Tensor = self._projection(self.states(pixel_values))
        return Encoded(seen.shape[0], seen.shape[1], partial(self._write_cross, seen))

    def step(self, step: Step) -> Tensor:
        """Write the tokens' keys and values into `past`; answers scores, float32 [rows, vocabulary]."""
        length = step.longest + 1
        mask = None
        if step.shortest + 1 < length:
            beyond = step.places[:length] > step.positions[:, None]
            mask = torch.zeros(beyond.shape, dtype=self.dtype, device=self.device)
            mask = mask.masked_fill_(beyond, -math.inf)[:, None, None, :]
        hidden = self._embed(step.tokens, step.positions)
        for index, layer in enumerate(self._layers):
            attended = self._attend_self(step, index, layer.self_attn, hidden, mask)
            hidden = layer.self_attn_layer_norm(hidden + attended)
            attended = self._attend_cross(step, index, layer.encoder_attn, hidden)
            hidden = layer.encoder_attn_layer_norm(hidden + attended)
            widened = layer.activation_fn(layer.fc1(hidden))
            hidden = layer.final_layer_norm(hidden + layer.fc2(widened))
        scores: Tensor = self._head(hidden).float()
        return scores

    def _write_cross(self, seen: Tensor, cross: Tensor) -> None:
        """Cross-attention keys and values of what the encoder has seen, straight to their places."""
        shape = (*seen.shape[:2], self.head_count, self.head_size)
        for layer, cache in zip(self._layers, cross, strict=True):
            for projection, places in zip((layer.encoder_attn.k_proj, layer.encoder_attn.v_proj), cache, strict=True):
                places[:] = projection(seen).view(shape).transpose(1, 2)

    def _attend_self(self, step: Step, index: int, attention: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
        count, length = hidden.shape[0], step.longest + 1
        shape = (count, self.head_count, self.head_size)
        keys, values = step.past[index]
        keys[step.row_numbers, :, step.positions] = attention.k_proj(hidden).view(shape)
        values[step.row_numbers, :, step.positions] = attention.v_proj(hidden).view(shape)
        attended = scaled_dot_product_attention(
            attention.q_proj(hidden).view(*shape[:2], 1, shape[2]),
            keys[:count, :, :length],
            values[:count, :, :length],
            attn_mask=mask,
            scale=attention.scaling,
        )
        out: Tensor = attention.out_proj(attended.reshape(count, -1))
        return out

    def _attend_cross(self, step: Step, index: int, attention: Any, hidden: Tensor) -> Tensor:
        keys, values = step.cross[index]
        query = attention.q_proj(hidden)
        # Rows of one image are queries of one attention problem: [images, heads, rows of the image, head size].
        if step.grid is not None:
            query = query[step.grid]
        query = query.view(step.image_count, -1, self.head_count, self.head_size).transpose(1, 2)
        attended = scaled_dot_product_attention(
            query, keys[: step.image_count], values[: step.image_count], scale=attention.scaling
        )
        attended = attended.transpose(1, 2).reshape(-1, self.head_count * self.head_size)
        if step.grid_places is not None:
            attended = attended[step.grid_places]
        out: Tensor = attention.out_proj(attended.view(hidden.shape[0], -1))
        return out

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Input of the first layer [rows, width] for one token a row, each at its own position (both int64 [rows])."""
        rows = self._first_position + positions
        if not self._learned_positions:
            # The sinusoidal table gives padding tokens no position, wherever they stand.
            rows = torch.where(tokens == self._pad_id, self._pad_id, rows)
        hidden: Tensor = self._embedding_norm(self._embed_tokens(tokens) + self._positions[rows])
        return hidden


def position_table(decoder: Any, config: Any, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, int]:
    """The position embeddings [positions, width] and the index in it of a row's first token."""
    embedding = decoder.embed_positions
    if config.use_learned_position_embeddings:
        return embedding.weight, int(embedding.offset)
    # Not the module's own table: loading leaves that one without content, because it is no parameter.
    first = config.pad_token_id + 1
    table = embedding.get_embedding(config.max_position_embeddings + first, config.hidden_size, config.pad_token_id)
    return table.to(device, dtype), first
