"""TrOCR-style checkpoints as two ONNX graphs: services/runtimes/trocr_graphs.py says what they take and answer.

The weights are those that torch_trocr.py loads, the layers those of transformers. The decoder's step is written out
here once more, because it has to be one pure function of tensors, and because what is fast in a graph is not what is
fast in eager torch.
"""

import math
import random
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.functional import embedding
from transformers import AttentionInterface, AutoImageProcessor, TrOCRForCausalLM, VisionEncoderDecoderModel

from services.compiler.export.exported import Exported, ExportedGraph, ExportError, repeated
from services.compiler.export.onnx_files import export_module, ports
from services.runtimes import checkpoints, torch_trocr
from services.runtimes import trocr_graphs as names
from services.runtimes.artifacts.manifest import Axis
from services.runtimes.checkpoints import CheckpointError
from services.runtimes.hardware import Hardware
from services.runtimes.precision import parameter_count
from services.runtimes.torch_trocr import position_table

# Rows of one image: the widest beam that the OCR service searches with (services.ocr.domain.BEAM_WIDTH_MOST).
WIDTH_MOST = 16
# Real texts of the examples; larger ones repeat them.
_EXAMPLE_IMAGES = 4
_EXAMPLE_LENGTH = 24

# Under which transformers knows `_attend`.
_ATTENTION = "inkwell_plain"
_CPU = Hardware("cpu", "cpu", "CPU", 0, 1)


def export(
    folder: Path,
    out: Path,
    say: Callable[[str], None],
    *,
    max_batch_size: int = 64,
    allow_pickled_weights: bool = False,
) -> Exported:
    """Write encoder.onnx and decoder.onnx of the checkpoint in `folder` into the folder `out`.

    max_batch_size: images of an encoder batch and rows of a decoder step that the graphs are declared for (at least
    WIDTH_MOST rows, so that every beam search fits). Raises CheckpointError for what is no TrOCR-style checkpoint,
    ExportError for what cannot be exported, OSError.
    """
    model = torch_trocr.load(
        folder, device="cpu", precision="float32", hardware=_CPU, allow_pickled_weights=allow_pickled_weights
    )
    if not isinstance(model.decoder, TrOCRForCausalLM):
        raise CheckpointError(f"{folder}: the decoder is a {type(model.decoder).__name__}, not TrOCRForCausalLM")
    model.requires_grad_(False)
    model.encoder.set_attn_implementation(_ATTENTION)
    config = model.decoder.config
    channels = int(getattr(model.config.encoder, "num_channels", 3))
    processor = _processor(folder)
    example = _Example(model, lambda images: _scribbles(processor, channels, images))
    height, width = example.pixels(1).shape[2:]
    rows_most = max(max_batch_size, WIDTH_MOST)
    layers = config.decoder_layers
    details = names.Details(
        layer_count=layers,
        head_count=config.decoder_attention_heads,
        head_size=config.hidden_size // config.decoder_attention_heads,
        position_limit=config.max_position_embeddings,
        channels=channels,
        image_height=height,
        image_width=width,
        parameter_count=parameter_count(model),
        has_class_token=any(name.endswith("cls_token") for name, _ in model.encoder.named_parameters()),
        weights_sha256=checkpoints.weights_sha256(folder),
    )
    axes = {
        names.ROWS: Axis(names.ROWS, 1, rows_most),
        names.PAST: Axis(names.PAST, 1, config.max_position_embeddings),
        names.WIDTH: Axis(names.WIDTH, 1, WIDTH_MOST),
    }
    dims = {name: Dim(name, min=axis.low, max=axis.high) for name, axis in axes.items()}

    say("exporting the encoder")
    images = Axis(names.IMAGES, 1, max_batch_size)
    encoder_file = out / "encoder.onnx"
    export_module(
        example.encoder,
        {names.PIXELS: example.pixels(2)},
        {names.PIXELS: {0: Dim(names.IMAGES, min=images.low, max=images.high)}},
        encoder_file,
        output_names=[names.STATES, *_each(names.cross, layers)],
    )
    encoder_inputs, encoder_outputs = ports(encoder_file)

    say("exporting the decoder")
    images_in_step = Axis(names.IMAGES, 1, rows_most)
    dims[names.IMAGES] = Dim(names.IMAGES, min=1, max=rows_most)
    past_shape, cross_shape = {0: dims[names.ROWS], 2: dims[names.PAST]}, {0: dims[names.IMAGES]}
    decoder_file = out / "decoder.onnx"
    sizes = {names.ROWS: 5, names.PAST: 3, names.IMAGES: 2, names.WIDTH: 4}
    export_module(
        example.decoder,
        example.decoder_arguments(sizes),
        {
            names.TOKENS: {0: dims[names.ROWS]},
            names.POSITIONS: {0: dims[names.ROWS]},
            names.CROSS_GRID: {0: dims[names.IMAGES], 1: dims[names.WIDTH]},
            names.CROSS_PLACES: {0: dims[names.ROWS]},
            "past": [past_shape] * (2 * layers),
            "cross": [cross_shape] * (2 * layers),
        },
        decoder_file,
        input_names=_decoder_inputs(layers),
        output_names=[names.LOGITS, *_each(names.new, layers)],
    )
    decoder_inputs, decoder_outputs = ports(decoder_file)
    return Exported(
        kind="trocr",
        graphs=(
            ExportedGraph(
                component=names.ENCODER,
                file=encoder_file,
                inputs=encoder_inputs,
                outputs=encoder_outputs,
                axes=(images,),
                reference=example.encoder_reference,
                example=lambda sizes: {names.PIXELS: example.pixels(sizes[names.IMAGES])},
            ),
            ExportedGraph(
                component=names.DECODER,
                file=decoder_file,
                inputs=decoder_inputs,
                outputs=decoder_outputs,
                axes=(*axes.values(), images_in_step),
                reference=example.decoder_reference,
                example=lambda sizes: _flat(example.decoder_arguments(sizes), layers),
            ),
        ),
        helper_files=tuple(_helper_files(folder)),
        details=msgspec.to_builtins(details),
    )


class Encoder(nn.Module):
    """The encoder and what of the decoder depends on the image alone. Its parts keep the checkpoint's names."""

    def __init__(self, model: VisionEncoderDecoderModel) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.enc_to_dec_proj: nn.Module = getattr(model, "enc_to_dec_proj", nn.Identity())
        self.decoder = model.decoder

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Answers states and, layer by layer, cross_k and cross_v."""
        states = self.encoder(pixel_values=pixel_values, return_dict=True)[0]
        seen = self.enc_to_dec_proj(states)
        outputs = [states]
        for layer in self.decoder.model.decoder.layers:
            attention = layer.encoder_attn
            shape = (-1, seen.shape[1], attention.num_heads, attention.head_dim)
            for projection in (attention.k_proj, attention.v_proj):
                outputs.append(projection(seen).view(shape).transpose(1, 2))
        return tuple(outputs)


class Decoder(nn.Module):
    """One step of the decoder. Its parts keep the checkpoint's names."""

    def __init__(self, model: VisionEncoderDecoderModel) -> None:
        super().__init__()
        self.decoder = model.decoder
        config = model.decoder.config
        decoder = model.decoder.model.decoder
        self._learned: bool = config.use_learned_position_embeddings
        self._pad_id: int = config.pad_token_id if config.pad_token_id is not None else -1
        table, self._first = position_table(decoder, config, torch.device("cpu"), torch.float32)
        if self._learned:
            self.table = table
        else:
            self.register_buffer("table", table)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cross_grid: Tensor,
        cross_places: Tensor,
        past: list[Tensor],
        cross: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """Answers logits and, layer by layer, new_k and new_v. past and cross: k and v, layer by layer."""
        decoder = self.decoder.model.decoder
        places = self._first + positions
        if not self._learned:
            # The sinusoidal table gives padding tokens no position, wherever they stand.
            places = torch.where(tokens == self._pad_id, self._pad_id, places)
        hidden = decoder.embed_tokens(tokens) + embedding(places, self.table)
        if decoder.layernorm_embedding is not None:
            hidden = decoder.layernorm_embedding(hidden)
        beyond = torch.arange(past[0].shape[2]) >= positions[:, None]
        beyond = beyond[:, None, None, :]
        new: list[Tensor] = []
        for index, layer in enumerate(decoder.layers):
            keys, values = 2 * index, 2 * index + 1
            attended, own = _attend_self(layer.self_attn, hidden, past[keys], past[values], beyond)
            new += own
            hidden = layer.self_attn_layer_norm(hidden + attended)
            attended = _attend_cross(layer.encoder_attn, hidden, cross[keys], cross[values], cross_grid, cross_places)
            hidden = layer.encoder_attn_layer_norm(hidden + attended)
            hidden = layer.final_layer_norm(hidden + layer.fc2(layer.activation_fn(layer.fc1(hidden))))
        return (self.decoder.output_projection(hidden), *new)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention in transformers' interface, [images, heads, patches, head size] to [images, patches, heads, head size].

    Scales the queries, which are fewer than the scores, and adds no mask where there is none: torch's own operator is
    exported with one of zeros.
    """
    scores = (query * scaling) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    return (torch.softmax(scores, dim=-1) @ value).transpose(1, 2), None


AttentionInterface.register(_ATTENTION, _attend)


def _attend_self(
    attention: Any, hidden: Tensor, past_keys: Tensor, past_values: Tensor, beyond: Tensor
) -> tuple[Tensor, list[Tensor]]:
    shape = (-1, attention.num_heads, 1, attention.head_dim)
    key, value = attention.k_proj(hidden).view(shape), attention.v_proj(hidden).view(shape)
    query = attention.q_proj(hidden).view(shape) * attention.scaling
    # The token's own key beside the past, not behind it: appending would copy the whole past.
    earlier = (query @ past_keys.transpose(-1, -2)).masked_fill(beyond, -math.inf)
    own = (query * key).sum(-1, keepdim=True)
    weights = torch.softmax(torch.cat((earlier, own), dim=-1), dim=-1)
    attended = weights[..., :-1] @ past_values + weights[..., -1:] * value
    return attention.out_proj(attended.reshape(-1, attention.num_heads * attention.head_dim)), [key, value]


def _attend_cross(
    attention: Any, hidden: Tensor, keys: Tensor, values: Tensor, grid: Tensor, grid_places: Tensor
) -> Tensor:
    # Rows of one image are queries of one attention problem: [images, heads, rows of the image, head size].
    query = embedding(grid, attention.q_proj(hidden) * attention.scaling)
    query = query.view(*grid.shape, attention.num_heads, attention.head_dim).transpose(1, 2)
    weights = torch.softmax(query @ keys.transpose(-1, -2), dim=-1)
    attended = (weights @ values).transpose(1, 2).reshape(-1, attention.num_heads * attention.head_dim)
    projected: Tensor = attention.out_proj(attended.index_select(0, grid_places))
    return projected


class _Example:
    """Inputs as they come while lines are read, and the modules that the graphs are made of."""

    def __init__(self, model: VisionEncoderDecoderModel, images: Callable[[int], Tensor]) -> None:
        self.encoder, self.decoder = Encoder(model).eval(), Decoder(model).eval()
        self._config = model.decoder.config
        self._images = images
        self._start: int = model.generation_config.decoder_start_token_id or 0
        self.layers = int(self._config.decoder_layers)

    @lru_cache(maxsize=1)  # noqa: B019 - lives as long as the export
    def _few_pixels(self) -> Tensor:
        return self._images(_EXAMPLE_IMAGES)

    @lru_cache(maxsize=1)  # noqa: B019
    def _few_cross(self) -> list[Tensor]:
        return list(self.encoder_reference({names.PIXELS: self._few_pixels()}).values())[1:]

    @lru_cache(maxsize=1)  # noqa: B019
    def _few_texts(self) -> tuple[Tensor, list[Tensor]]:
        """Tokens [texts, length] of greedy reading, one text an image, and the keys and values of all of them."""
        length = min(_EXAMPLE_LENGTH, self._config.max_position_embeddings)
        texts = _EXAMPLE_IMAGES
        numbers, cross = torch.arange(texts), self._few_cross()
        heads, size = cross[0].shape[1], cross[0].shape[3]
        past = [torch.zeros(texts, heads, length, size) for _ in range(2 * self.layers)]
        tokens = torch.full((texts, length + 1), self._start)
        for position in range(length):
            with torch.no_grad():
                logits, *new = self.decoder(
                    tokens[:, position], torch.full((texts,), position), numbers[:, None], numbers, past, cross
                )
            for cache, own in zip(past, new, strict=True):
                cache[:, :, position] = own[:, :, 0]
            # Never the same token twice in a row, as models with random weights would have it.
            logits[numbers, tokens[:, position]] = -math.inf
            tokens[:, position + 1] = logits.argmax(-1)
        return tokens, past

    def pixels(self, images: int) -> Tensor:
        """Preprocessed images float32 [images, channels, height, width]."""
        return repeated(self._few_pixels(), images)

    def decoder_arguments(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        """Arguments of Decoder.forward."""
        rows, images = sizes[names.ROWS], sizes[names.IMAGES]
        length, width = sizes[names.PAST], sizes[names.WIDTH]
        texts, few_past = self._few_texts()
        written = few_past[0].shape[2]
        # Rows at positions from the first to the last; what is beyond a row's own is there and has to be ignored.
        positions = torch.tensor([row * 7919 % length for row in range(rows)])
        positions[0] = length - 1
        numbers = torch.arange(rows)
        at = torch.arange(length) % written
        grid = torch.tensor([[(image + n * images) % rows for n in range(width)] for image in range(images)])
        return {
            names.TOKENS: texts[numbers % len(texts), positions % written],
            names.POSITIONS: positions,
            names.CROSS_GRID: grid,
            names.CROSS_PLACES: (numbers % images) * width + numbers // images % width,
            "past": [repeated(tensor[:, :, at], rows) for tensor in few_past],
            "cross": [repeated(tensor, images) for tensor in self._few_cross()],
        }

    @torch.no_grad()
    def encoder_reference(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = self.encoder(inputs[names.PIXELS])
        return dict(zip((names.STATES, *_each(names.cross, self.layers)), outputs, strict=True))

    @torch.no_grad()
    def decoder_reference(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = self.decoder(
            inputs[names.TOKENS],
            inputs[names.POSITIONS],
            inputs[names.CROSS_GRID],
            inputs[names.CROSS_PLACES],
            [inputs[name] for name in _each(names.past, self.layers)],
            [inputs[name] for name in _each(names.cross, self.layers)],
        )
        return dict(zip((names.LOGITS, *_each(names.new, self.layers)), outputs, strict=True))


def _each(pair: Callable[[int], tuple[str, str]], layers: int) -> list[str]:
    return [name for layer in range(layers) for name in pair(layer)]


def _decoder_inputs(layers: int) -> list[str]:
    alone = [names.TOKENS, names.POSITIONS, names.CROSS_GRID, names.CROSS_PLACES]
    return [*alone, *_each(names.past, layers), *_each(names.cross, layers)]


def _flat(arguments: Mapping[str, Any], layers: int) -> dict[str, Tensor]:
    """Decoder.forward's arguments as the graph's inputs by name."""
    tensors = []
    for value in arguments.values():
        tensors += value if isinstance(value, list) else [value]
    return dict(zip(_decoder_inputs(layers), tensors, strict=True))


def _processor(folder: Path) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    except Exception as error:  # a folder can be broken in any way, and the library raises whatever it met
        raise CheckpointError(f"{folder}: its image processor cannot be loaded: {error}") from error


def _scribbles(processor: Any, channels: int, count: int) -> Tensor:
    """Preprocessed images of pen strokes, each another one."""
    source = random.Random(0)
    images = []
    for _ in range(count):
        image = Image.new("RGB", (640, 64), "white")
        points = [(x, source.randrange(8, 56)) for x in range(8, 632, source.randrange(5, 14))]
        ImageDraw.Draw(image).line(points, fill=(30, 30, 60), width=3, joint="curve")
        images.append(image.convert("L") if channels == 1 else image)
    try:
        pixels: Tensor = processor(images, return_tensors="pt")["pixel_values"]
    except Exception as error:  # code of the library run on whatever the folder says
        raise ExportError(f"the image processor does not take a line: {error}") from error
    return pixels.float()


def _helper_files(folder: Path) -> list[Path]:
    """All files of the folder that are no weights: configuration, tokenizer, image processor, calibration, card."""
    suffixes = {".json", ".txt", ".model", ".jinja", ".md"}
    return sorted(
        path.relative_to(folder)
        for path in folder.iterdir()
        if path.is_file() and path.suffix in suffixes and not _is_weight_index(path)
    )


def _is_weight_index(path: Path) -> bool:
    return path.name.endswith((".safetensors.index.json", ".bin.index.json"))
