"""One model as the service reads with it: networks, image processor, tokenizer and generation config of its folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from PIL import Image
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, GenerationConfig
from transformers.generation import logits_process as processing

from services.ocr import catalog
from services.ocr.domain import (
    BEAM_WIDTH_MOST,
    LENGTH_PENALTY_MOST,
    NO_REPEAT_NGRAM_MOST,
    Decoding,
    EarlyStopping,
    Line,
    ModelInfo,
    Precision,
)
from services.ocr.engine.calibration import Calibration, CalibrationError
from services.ocr.engine.calibration import read as read_calibration
from services.ocr.settings import Settings
from services.runtimes import torch_trocr
from services.runtimes.checkpoints import CheckpointError
from services.runtimes.hardware import Hardware

# Tokens that transformers before 5 decoded at most when nobody said.
_OLD_LIBRARY_LENGTH = 20

# Scores [rows, vocabulary] of rows that all hold the same number of tokens [rows, tokens] -> scores to rank by.
Ruling = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ReadingModel:
    """A loaded model. `info` is what callers see of it."""

    info: ModelInfo
    networks: torch_trocr.TrocrModel
    start_id: int
    eos_ids: frozenset[int]
    generation: GenerationConfig
    processor: Any
    tokenizer: Any
    calibration: Calibration | None

    def prepare(self, lines: Sequence[Line]) -> Tensor:
        """The model's own preprocessing; answers float [lines, channels, height, width]."""
        return preprocess(self.processor, self.networks.channels, lines)

    def text(self, ids: Sequence[int]) -> str:
        """What the tokenizer makes of the tokens, special ones skipped."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text."""
        stream = DecodeStream(skip_special_tokens=True)
        return [stream.step(self.tokenizer.backend_tokenizer, token) or "" for token in ids]

    def ruling(self, decoding: Decoding) -> Ruling | None:
        """What the call's options and the folder's generation config rule out or force, None for nothing.

        The order is the library's own. The token rows that a ruling is given begin with the start token.
        """
        config = self.generation
        eos = sorted(self.eos_ids)
        rules = processing.LogitsProcessorList()
        if config.repetition_penalty not in (None, 1.0):
            rules.append(processing.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
        if decoding.no_repeat_ngram_size:
            rules.append(processing.NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram_size))
        if config.bad_words_ids:
            rules.append(processing.NoBadWordsLogitsProcessor(config.bad_words_ids, eos))
        if config.min_length and eos:
            rules.append(processing.MinLengthLogitsProcessor(config.min_length, eos))
        if config.min_new_tokens and eos:
            rules.append(processing.MinNewTokensLengthLogitsProcessor(1, config.min_new_tokens, eos))
        if config.forced_bos_token_id is not None:
            rules.append(processing.ForcedBOSTokenLogitsProcessor(config.forced_bos_token_id))
        if config.forced_eos_token_id is not None:
            rules.append(
                processing.ForcedEOSTokenLogitsProcessor(decoding.max_new_token_count + 1, config.forced_eos_token_id)
            )
        if config.suppress_tokens:
            rules.append(processing.SuppressTokensLogitsProcessor(config.suppress_tokens))
        if config.begin_suppress_tokens:
            begin = 1 if config.forced_bos_token_id is None else 2
            rules.append(processing.SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, begin))
        return rules or None


def load(
    name: str,
    folder: Path,
    *,
    precision: Precision,
    settings: Settings,
    hardware: Hardware,
) -> ReadingModel:
    """Load a TrOCR-style folder; raises CheckpointError with what is wrong with it.

    May run on any thread while other models read.
    """
    device = hardware.device if settings.device == "auto" else settings.device
    model = torch_trocr.load(
        folder,
        device=device,
        precision=precision,
        hardware=hardware,
        allow_pickled_weights=settings.allow_pickled_weights,
    )
    networks = torch_trocr.TrocrModel(model)
    processor, tokenizer = load_helpers(folder)
    try:
        calibration = read_calibration(folder)
    except CalibrationError as error:
        raise CheckpointError(str(error)) from error
    generation = model.generation_config
    start_id = generation.decoder_start_token_id
    if start_id is None:
        start_id = generation.bos_token_id
    eos = generation.eos_token_id
    if start_id is None or eos is None:
        raise CheckpointError(f"{folder}: its generation config names no decoder_start_token_id or eos_token_id")
    same_device = device.partition(":")[0] == hardware.device.partition(":")[0]
    limit = min(networks.position_limit, settings.max_new_token_limit)
    loaded = ReadingModel(
        info=ModelInfo(
            name=name,
            hardware=hardware.label if same_device else device.partition(":")[0],
            runtime="torch",
            dtype=str(networks.dtype).removeprefix("torch."),
            parameter_count=networks.parameter_count,
            default_decoding=_default_decoding(generation, settings.default_max_new_token_count, limit),
            max_new_token_limit=limit,
            is_default=name == settings.default_model_name,
            precision=precision,
            weight_bytes=networks.weight_bytes,
            languages=catalog.languages_of(name, folder, settings),
            has_class_token=networks.has_class_token,
            confidence_calibrated=calibration is not None,
        ),
        networks=networks,
        start_id=start_id,
        eos_ids=frozenset(eos if isinstance(eos, list) else [eos]),
        generation=generation,
        processor=processor,
        tokenizer=tokenizer,
        calibration=calibration,
    )
    _check_fixed_size(loaded, folder)
    tokens, width = _state_shape(loaded, folder)
    info = msgspec.structs.replace(loaded.info, embedding_token_count=tokens, embedding_width=width)
    return replace(loaded, info=info)


def preprocess(processor: Any, channels: int, lines: Sequence[Line]) -> Tensor:
    """A folder's image processor on lines; answers float [lines, channels, height, width]."""
    mode = "L" if channels == 1 else "RGB"
    images = [Image.frombytes("RGB", (line.width, line.height), line.pixels).convert(mode) for line in lines]
    pixels: Tensor = processor(images, return_tensors="pt")["pixel_values"]
    return pixels


def load_helpers(folder: Path) -> tuple[Any, Any]:
    """A folder's image processor and tokenizer; raises CheckpointError."""
    try:
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    except Exception as error:  # a folder can be broken in any way, and the library raises whatever it met
        raise CheckpointError(f"{folder}: its image processor cannot be loaded: {_short(error)}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded: {_short(error)}") from error
    if not tokenizer.is_fast:
        raise CheckpointError(f"{folder}: its tokenizer has no tokenizer.json; save it once as a fast tokenizer")
    return processor, tokenizer


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def _state_shape(model: ReadingModel, folder: Path) -> tuple[int, int]:
    """Tokens and width of an image's encoder states, found by encoding a blank line."""
    try:
        with torch.inference_mode():
            states = model.networks.states(model.prepare([Line(64, 16, b"\xff" * (64 * 16 * 3))]))
    except (RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: its encoder does not take a line: {_short(error)}") from error
    return states.shape[1], states.shape[2]


def _default_decoding(generation: GenerationConfig, usual_length: int, limit: int) -> Decoding:
    width = min(max(generation.num_beams or 1, 1), BEAM_WIDTH_MOST)
    penalty = 1.0 if generation.length_penalty is None else float(generation.length_penalty)
    length = generation.max_new_tokens
    # config.json of older folders repeats the library's default of its time, which cuts lines and which nobody chose.
    repeated = generation._from_model_config and generation.max_length == _OLD_LIBRARY_LENGTH
    if length is None and generation.max_length is not None and not repeated:
        length = generation.max_length - 1  # the start token counts there
    # What the library calls True, False and "never".
    early_stopping: EarlyStopping = "first" if generation.early_stopping is True else "heuristic"
    if generation.early_stopping == "never":
        early_stopping = "never"
    return Decoding(
        beam_width=width,
        hypothesis_count=min(max(generation.num_return_sequences or 1, 1), width),
        length_penalty=min(max(penalty, -LENGTH_PENALTY_MOST), LENGTH_PENALTY_MOST),
        max_new_token_count=max(1, min(usual_length if length is None else length, limit)),
        no_repeat_ngram_size=min(max(generation.no_repeat_ngram_size or 0, 0), NO_REPEAT_NGRAM_MOST),
        early_stopping=early_stopping,
    )


def _check_fixed_size(model: ReadingModel, folder: Path) -> None:
    """Images share batches, so the processor must bring all of them to one size."""
    try:
        shapes = {tuple(model.prepare([Line(w, h, bytes(w * h * 3))]).shape[1:]) for w, h in ((64, 16), (40, 50))}
    except Exception as error:  # the processor is code of the library run on whatever the folder says
        raise CheckpointError(f"{folder}: its image processor does not take a line: {_short(error)}") from error
    if len(shapes) > 1:
        raise CheckpointError(f"{folder}: its image processor answers different sizes for different images: {shapes}")
