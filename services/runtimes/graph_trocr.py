"""Runs a TrOCR-style model from its two compiled graphs (trocr_graphs.py), on whatever runtime opens them."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from services.runtimes import trocr_graphs as names
from services.runtimes.artifacts.manifest import Axis, Manifest, Port
from services.runtimes.checkpoints import CheckpointError
from services.runtimes.sessions.interface import Session, SessionOptions
from services.runtimes.trocr_rows import Encoded, Step


class GraphTrocr:
    """The two networks of one model, for inference: trocr_rows.Networks."""

    reads_whole_past = True

    def __init__(self, encoder: Session, decoder: Session, manifest: Manifest, device: str = "cpu") -> None:
        """Takes the sessions over. device: where keys and values are kept, as torch calls it.

        Raises CheckpointError for graphs of another contract.
        """
        try:
            details = msgspec.convert(manifest.details, names.Details)
        except msgspec.ValidationError as error:
            raise CheckpointError(f"the artifact's details are not those of a TrOCR-style model: {error}") from error
        self._encoder, self._decoder = encoder, decoder
        self.runtime: str = decoder.runtime
        self.device = torch.device(device)
        self.layer_count, self.head_count, self.head_size = details.layer_count, details.head_count, details.head_size
        self.position_limit, self.channels = details.position_limit, details.channels
        self.parameter_count, self.has_class_token = details.parameter_count, details.has_class_token
        self.weight_bytes = manifest.weight_bytes
        axes = {graph.component: {axis.name: axis for axis in graph.axes} for graph in manifest.graphs}
        self.image_limit = _limit(axes, names.ENCODER, names.IMAGES)
        self.row_limit = min(
            _limit(axes, names.DECODER, names.ROWS),
            _limit(axes, names.DECODER, names.IMAGES),
        )
        self._cross = [name for layer in range(self.layer_count) for name in names.cross(layer)]
        self._past = [name for layer in range(self.layer_count) for name in names.past(layer)]
        self._new = [name for layer in range(self.layer_count) for name in names.new(layer)]
        wanted = {names.TOKENS, names.POSITIONS, names.CROSS_GRID, names.CROSS_PLACES, *self._past, *self._cross}
        _require(decoder.inputs, wanted, "decoder: its inputs")
        _require(decoder.outputs, {names.LOGITS, *self._new}, "decoder: its outputs")
        _require(encoder.inputs, {names.PIXELS}, "encoder: its inputs")
        _require(encoder.outputs, {names.STATES, *self._cross}, "encoder: its outputs")
        self.dtype = _dtype(decoder.inputs, self._past[0])
        self._pixel_dtype = _dtype(encoder.inputs, names.PIXELS)

    def states(self, pixel_values: Tensor) -> Tensor:
        """Preprocessed images float [images, channels, height, width] to [images, tokens, width of the encoder].

        Raises SessionError.
        """
        return self._encode(pixel_values, [names.STATES])[names.STATES]

    def encode(self, pixel_values: Tensor) -> Encoded:
        """Preprocessed images as in `states` to what the decoder looks at. Raises SessionError."""
        encoded = self._encode(pixel_values, self._cross)
        images, _, patches, _ = encoded[self._cross[0]].shape
        return Encoded(images, patches, partial(self._write_cross, encoded))

    def step(self, step: Step) -> Tensor:
        """Write the tokens' keys and values into `past`; answers scores, float32 [rows, vocabulary].

        Raises SessionError.
        """
        rows, images = len(step.tokens), step.image_count
        grid, places = step.grid, step.grid_places
        if grid is None or places is None:
            # One row an image, in the same order.
            grid, places = step.row_numbers[:, None], step.row_numbers
        feeds = {
            names.TOKENS: step.tokens,
            names.POSITIONS: step.positions,
            names.CROSS_GRID: grid,
            names.CROSS_PLACES: places,
        }
        # Slices along the first axis of whole buffers: nothing is copied.
        feeds.update(zip(self._past, step.past[:, :, :rows].flatten(0, 1).unbind(), strict=True))
        feeds.update(zip(self._cross, step.cross[:, :, :images].flatten(0, 1).unbind(), strict=True))
        answer = self._decoder.run(feeds)
        for cache, name in zip(step.past.flatten(0, 1).unbind(), self._new, strict=True):
            cache[step.row_numbers, :, step.positions] = answer[name][:, :, 0].to(cache.device, cache.dtype)
        return answer[names.LOGITS].float()

    def close(self) -> None:
        """Free the memory of both graphs."""
        self._encoder.close()
        self._decoder.close()

    def _encode(self, pixel_values: Tensor, wanted: list[str]) -> dict[str, Tensor]:
        pixels = pixel_values.to(self.device, self._pixel_dtype).contiguous()
        return self._encoder.run({names.PIXELS: pixels}, wanted)

    def _write_cross(self, encoded: Mapping[str, Tensor], cross: Tensor) -> None:
        for index, name in enumerate(self._cross):
            cross[index // 2, index % 2].copy_(encoded[name])


def open_graphs(folder: Path, manifest: Manifest, options: SessionOptions) -> GraphTrocr:
    """Open the graphs of an artifact whose files lie in the folder.

    Raises SessionError (HardwareMissingError among them), CheckpointError for an artifact of another kind.
    """
    # Late: the runtimes' packages take long to import, and torch alone needs none of them.
    from services.runtimes.sessions.opening import open_session

    encoder, decoder = manifest.graph(names.ENCODER), manifest.graph(names.DECODER)
    if manifest.kind != "trocr" or encoder is None or decoder is None:
        raise CheckpointError(f"the artifact of {manifest.model} holds a model of kind {manifest.kind}, not trocr")
    opened: list[Session] = []
    try:
        for graph in (encoder, decoder):
            opened.append(open_session(folder / graph.file, manifest.runtime, options))
        # These take tensors where they lie, and answer there; the others work from the processor's memory.
        on_device = options.hardware.label == "cuda" and manifest.runtime in ("onnxruntime", "tensorrt")
        return GraphTrocr(opened[0], opened[1], manifest, options.hardware.device if on_device else "cpu")
    except BaseException:
        for session in opened:
            session.close()
        raise


def _limit(axes: Mapping[str, Mapping[str, Axis]], component: str, axis: str) -> int:
    found = axes.get(component, {}).get(axis)
    if found is None:
        raise CheckpointError(f"the artifact's {component} has no axis {axis!r}")
    return found.high


def _require(ports: tuple[Port, ...], wanted: set[str], what: str) -> None:
    found = {port.name for port in ports}
    if found != wanted:
        odd = sorted(found ^ wanted)
        raise CheckpointError(f"{what} are not those of this version, such as {odd[0]}; compile the model again")


def _dtype(ports: tuple[Port, ...], name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, next(port.dtype for port in ports if port.name == name))
    return dtype
