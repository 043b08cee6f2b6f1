"""Runs a VisionEncoderDecoderModel with a TrOCR decoder on torch, many rows at different positions in one step.

The weights and layers are those of transformers; the forward pass through the decoder is our own, because the
library's takes one position for the whole batch. What it computes for a row is what the library computes for that row
alone, up to the last bits of floating point.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import TrOCRForCausalLM, VisionEncoderDecoderModel

from services.runtimes import int8_folder
from services.runtimes.checkpoints import CheckpointError, read_config, require_weights
from services.runtimes.hardware import Hardware
from services.runtimes.precision import Precision, apply_precision, parameter_count, refusal, weight_bytes
from services.runtimes.torch_speed import can_pack, pack_linears, packs_many_rows

_FIRST_LENGTH = 64
_FIRST_ROWS = 4
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
    """The two networks of one model, for inference."""

    def __init__(self, model: VisionEncoderDecoderModel) -> None:
        """Takes the model over: on a processor its linear layers are replaced by faster ones.

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
            if packs_many_rows():
                pack_linears(model)
        self._encoder = model.encoder
        self._projection: nn.Module = getattr(model, "enc_to_dec_proj", nn.Identity())
        self._head = model.decoder.output_projection
        decoder = model.decoder.model.decoder
        self._embed_tokens = decoder.embed_tokens
        self._embedding_norm: nn.Module = decoder.layernorm_embedding or nn.Identity()
        self.layers: list[Any] = list(decoder.layers)
        self.head_count: int = config.decoder_attention_heads
        self.head_size: int = config.hidden_size // config.decoder_attention_heads
        self.channels = int(getattr(model.config.encoder, "num_channels", 3))
        self.position_limit: int = config.max_position_embeddings
        # Vision transformers of all families call it so; encoders that pool instead (Swin) have none.
        self.has_class_token = any(name.endswith("cls_token") for name, _ in model.encoder.named_parameters())
        self._pad_id: int = config.pad_token_id if config.pad_token_id is not None else -1
        self._positions, self._first_position = _position_table(decoder, config, self.device, self.dtype)
        self._learned_positions: bool = config.use_learned_position_embeddings

    def states(self, pixel_values: Tensor) -> Tensor:
        """Preprocessed images float [images, channels, height, width] to what the encoder answers for them.

        The result is [images, tokens, width of the encoder].
        """
        pixels = pixel_values.to(self.device, self.dtype)
        states: Tensor = self._encoder(pixel_values=pixels, return_dict=True)[0]
        return states

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Preprocessed images as in `states` to what the decoder looks at, [images, tokens, width of the decoder]."""
        projected: Tensor = self._projection(self.states(pixel_values))
        return projected

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Input of the first layer [rows, width] for one token a row, each at its own position (both int64 [rows])."""
        rows = self._first_position + positions
        if not self._learned_positions:
            # The sinusoidal table gives padding tokens no position, wherever they stand.
            rows = torch.where(tokens == self._pad_id, self._pad_id, rows)
        hidden: Tensor = self._embedding_norm(self._embed_tokens(tokens) + self._positions[rows])
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Output of the last layer [rows, width] to scores over the vocabulary, float32 [rows, tokens]."""
        scores: Tensor = self._head(hidden).float()
        return scores


def _position_table(decoder: Any, config: Any, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, int]:
    """The position embeddings [positions, width] and the index in it of a row's first token."""
    embedding = decoder.embed_positions
    if config.use_learned_position_embeddings:
        return embedding.weight, int(embedding.offset)
    # Not the module's own table: loading leaves that one without content, because it is no parameter.
    first = config.pad_token_id + 1
    table = embedding.get_embedding(config.max_position_embeddings + first, config.hidden_size, config.pad_token_id)
    return table.to(device, dtype), first


class Rows:
    """The rows that a model is decoding: their caches, positions and the images they look at.

    Rows 0 … count-1 and images 0 … image_count-1 are in use, without holes, so that attention runs on slices of
    preallocated tensors. A row's keys and values lie at its own positions; a mask hides what is beyond. An image's
    cross-attention keys and values are computed once and shared by its rows.
    """

    def __init__(self, model: TrocrModel) -> None:
        self._model = model
        self._layers = len(model.layers)
        # [layers, 2 (keys, values), rows, heads, length, head size]
        self._past = self._empty(_FIRST_ROWS, _FIRST_LENGTH)
        # [layers, 2, images, heads, patches, head size]; its shape is known with the first image
        self._cross: Tensor | None = None
        self._row_positions: list[int] = []
        self._row_images: list[int] = []
        self._image_count = 0
        self._places: Tensor
        self._positions: Tensor
        self._seat()

    @property
    def count(self) -> int:
        """Rows in use."""
        return len(self._row_positions)

    @property
    def image_count(self) -> int:
        """Images in use."""
        return self._image_count

    def join(self, states: Tensor) -> list[int]:
        """Add images (encoder states [images, patches, width]) with one row each, at position 0; answers the rows.

        An image's number is image_count before the call, plus its place.
        """
        model = self._model
        images, patches, _ = states.shape
        shape = (images, patches, model.head_count, model.head_size)
        used = self._image_count
        self._grow_cross(used + images, patches)
        assert self._cross is not None
        for layer, cache in zip(model.layers, self._cross, strict=True):
            # Straight to their places: together these are the largest tensors there are.
            for projection, places in zip((layer.encoder_attn.k_proj, layer.encoder_attn.v_proj), cache, strict=True):
                places[used : used + images] = projection(states).view(shape).transpose(1, 2)
        rows = list(range(self.count, self.count + images))
        self._row_positions += [0] * images
        self._row_images += range(used, used + images)
        self._image_count += images
        self._grow(self.count, 1)
        self._seat()
        return rows

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Feed one token to every row and move each one position on; answers scores, float32 [rows, vocabulary].

        The model's position_limit bounds a row's steps.
        """
        model = self._model
        count = self.count
        length = max(self._row_positions) + 1
        self._grow(count, length)
        positions = self._positions
        mask = None
        if min(self._row_positions) + 1 < length:
            beyond = self._places[:length] > positions[:, None]
            mask = torch.zeros((count, length), dtype=model.dtype, device=model.device)
            mask = mask.masked_fill_(beyond, -math.inf)[:, None, None, :]
        hidden = model.embed(torch.tensor(tokens, device=model.device), positions)
        for index, layer in enumerate(model.layers):
            attended = self._attend_self(index, layer.self_attn, hidden, length, mask)
            hidden = layer.self_attn_layer_norm(hidden + attended)
            attended = self._attend_cross(index, layer.encoder_attn, hidden)
            hidden = layer.encoder_attn_layer_norm(hidden + attended)
            widened = layer.activation_fn(layer.fc1(hidden))
            hidden = layer.final_layer_norm(hidden + layer.fc2(widened))
        self._row_positions = [position + 1 for position in self._row_positions]
        self._positions = positions + 1
        return model.logits(hidden)

    def rearrange(self, groups: Sequence[tuple[int, Sequence[int]]]) -> list[tuple[int, list[int]]]:
        """Keep only these: for each image its number and, for each row it is to have, the row to continue from.

        A row may be continued by several; rows and images that are not named are gone. Answers for each image its
        number and rows from now on, in the order asked.
        """
        wanted = [source for _, sources in groups for source in sources]
        if wanted == list(range(self.count)) and [image for image, _ in groups] == list(range(self._image_count)):
            return [(image, list(sources)) for image, sources in groups]
        rows = _seats(wanted)
        images = _seats([image for image, _ in groups])
        length = max((self._row_positions[source] for source in wanted), default=0)
        self._grow(len(wanted), length)
        _move(self._past[..., :length, :], wanted, rows)
        if self._cross is not None:
            _move(self._cross, [image for image, _ in groups], images)
        positions, row_images, placed = [0] * len(rows), [0] * len(rows), []
        taken = iter(zip(rows, wanted, strict=True))
        for image, (_, sources) in zip(images, groups, strict=True):
            own = []
            for row, source in (next(taken) for _ in sources):
                positions[row], row_images[row] = self._row_positions[source], image
                own.append(row)
            placed.append((image, own))
        self._row_positions, self._row_images, self._image_count = positions, row_images, len(images)
        self._seat()
        return placed

    def _attend_self(self, index: int, attention: Any, hidden: Tensor, length: int, mask: Tensor | None) -> Tensor:
        model, count = self._model, hidden.shape[0]
        shape = (count, model.head_count, model.head_size)
        keys, values = self._past[index]
        keys[self._row_numbers, :, self._positions] = attention.k_proj(hidden).view(shape)
        values[self._row_numbers, :, self._positions] = attention.v_proj(hidden).view(shape)
        attended = scaled_dot_product_attention(
            attention.q_proj(hidden).view(*shape[:2], 1, shape[2]),
            keys[:count, :, :length],
            values[:count, :, :length],
            attn_mask=mask,
            scale=attention.scaling,
        )
        out: Tensor = attention.out_proj(attended.reshape(count, -1))
        return out

    def _attend_cross(self, index: int, attention: Any, hidden: Tensor) -> Tensor:
        assert self._cross is not None
        model, count = self._model, hidden.shape[0]
        keys, values = self._cross[index]
        query = attention.q_proj(hidden)
        # Rows of one image are queries of one attention problem: [images, heads, rows of the image, head size].
        if self._grid is not None:
            query = query[self._grid]
        query = query.view(self._image_count, -1, model.head_count, model.head_size).transpose(1, 2)
        attended = scaled_dot_product_attention(
            query, keys[: self._image_count], values[: self._image_count], scale=attention.scaling
        )
        attended = attended.transpose(1, 2).reshape(-1, model.head_count * model.head_size)
        if self._grid is not None:
            attended = attended[self._grid_places]
        out: Tensor = attention.out_proj(attended.view(count, -1))
        return out

    def _seat(self) -> None:
        """Rebuild the index tensors after rows or images changed."""
        device = self._model.device
        self._row_numbers = torch.arange(self.count, device=device)
        self._positions = torch.tensor(self._row_positions, dtype=torch.int64, device=device)
        self._places = torch.arange(self._past.shape[4], device=device)
        # Which row is the n-th of each image, [images * most rows of one]; None when it is row = image.
        self._grid: Tensor | None = None
        if self._row_images != list(range(self._image_count)):
            own: list[list[int]] = [[] for _ in range(self._image_count)]
            places = []
            for row, image in enumerate(self._row_images):
                places.append((image, len(own[image])))
                own[image].append(row)
            most = max(map(len, own))
            # Images with fewer rows are filled up with a row whose result nobody takes.
            self._grid = torch.tensor([row for rows in own for row in rows + rows[:1] * (most - len(rows))]).to(device)
            self._grid_places = torch.tensor([image * most + place for image, place in places]).to(device)

    def _grow(self, rows: int, length: int) -> None:
        has_rows, has_length = self._past.shape[2], self._past.shape[4]
        if rows <= has_rows and length <= has_length:
            return
        new_rows = has_rows if rows <= has_rows else max(rows, 2 * has_rows)
        new_length = has_length if length <= has_length else max(length, 2 * has_length)
        past = self._empty(new_rows, min(new_length, self._model.position_limit))
        past[:, :, :has_rows, :, :has_length] = self._past
        self._past = past
        self._places = torch.arange(past.shape[4], device=past.device)

    def _grow_cross(self, images: int, patches: int) -> None:
        has = 0 if self._cross is None else self._cross.shape[2]
        if images <= has:
            return
        model = self._model
        shape = (self._layers, 2, max(images, 2 * has, _FIRST_ROWS), model.head_count, patches, model.head_size)
        grown = torch.empty(shape, dtype=model.dtype, device=model.device)
        if self._cross is not None:
            grown[:, :, : self._image_count] = self._cross[:, :, : self._image_count]
        self._cross = grown

    def _empty(self, rows: int, length: int) -> Tensor:
        model = self._model
        shape = (self._layers, 2, rows, model.head_count, min(length, model.position_limit), model.head_size)
        # Zeros, because masked places are still multiplied, and zero times an uninitialised NaN is NaN.
        return torch.zeros(shape, dtype=model.dtype, device=model.device)


def _seats(sources: Sequence[int]) -> list[int]:
    """A place below len(sources) for each source, its own where that is free, so that little has to be moved.

    A place other than the source's own is never a source too: the first to ask for a source below len(sources) stays
    there.
    """
    places: list[int | None] = [None] * len(sources)
    free = set(range(len(sources)))
    for index, source in enumerate(sources):
        if source in free:
            places[index] = source
            free.remove(source)
    rest = iter(sorted(free))
    return [next(rest) if place is None else place for place in places]


def _move(cache: Tensor, sources: Sequence[int], places: Sequence[int]) -> None:
    """Copy rows (dimension 2) of a cache to places out of `_seats`."""
    for source, place in zip(sources, places, strict=True):
        if source != place:
            # One by one: gathering them first takes memory as large again, and up to seven times as long.
            cache[:, :, place] = cache[:, :, source]
