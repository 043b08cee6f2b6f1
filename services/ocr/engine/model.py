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
)
from services.ocr.engine.calibration import Calibration, CalibrationError
from services.ocr.engine.calibration import read as read_calibration
from services.ocr.engine.sources import Source, on_device, open_source
from services.ocr.settings import Settings
from services.runtimes import model_version, torch_trocr, trocr_graphs
from services.runtimes.checkpoints import CheckpointError
from services.runtimes.hardware import Hardware
from services.runtimes.trocr_rows import Networks

# Tokens that transformers before 5 decoded at most when nobody said.
_OLD_LIBRARY_LENGTH = 20

# Scores [rows, vocabulary] of rows that all hold the same number of tokens [rows, tokens] -> scores to rank by.
Ruling = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ReadingModel:
    """A loaded model. `info` is what callers see of it."""

    info: ModelInfo
    networks: Networks
    start_id: int
    eos_ids: frozenset[int]
    generation: GenerationConfig
    processor: Any
    tokenizer: Any
    calibration: Calibration | None
    close: Callable[[], None]  # frees what it holds outside of Python's memory

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


def load(name: str, folder: Path, *, source: Source, settings: Settings, hardware: Hardware) -> ReadingModel:
    """Load a TrOCR-style checkpoint's folder, or the artifact of it that `source` names.

    Raises CheckpointError with what is wrong with it, and for artifacts StoreError and SessionError. May run on any
    thread while other models read.
    """
    where = on_device(hardware, settings)
    if source.stored is not None:
        opened = open_source(name, source.stored, settings, hardware)
        try:
            known = msgspec.convert(source.stored.manifest.details, trocr_graphs.Details)
            return _reading(
                name,
                opened.helpers,
                networks=opened.networks,
                generation=_generation(opened.helpers),
                weights_sha256=known.weights_sha256,
                source=source,
                settings=settings,
                hardware=where,
                close=opened.close,
            )
        except BaseException:
            opened.close()
            raise
    assert source.precision != "int4_weight_only"
    model = torch_trocr.load(
        folder,
        device=where.device,
        precision=source.precision,
        hardware=hardware,
        allow_pickled_weights=settings.allow_pickled_weights,
    )
    return _reading(
        name,
        folder,
        # Layers of 8 bits are kernels of their own already.
        networks=torch_trocr.TrocrModel(
            model,
            compile_for=where if settings.torch_compile == "on" and not source.precision.startswith("int8") else None,
        ),
        generation=model.generation_config,
        weights_sha256=None,
        source=source,
        settings=settings,
        hardware=where,
        close=lambda: None,
    )


def _reading(
    name: str,
    folder: Path,
    *,
    networks: Networks,
    generation: GenerationConfig,
    weights_sha256: str | None,
    source: Source,
    settings: Settings,
    hardware: Hardware,
    close: Callable[[], None],
) -> ReadingModel:
    """What the networks read with: the files in the folder that are no weights.

    weights_sha256: of the weights that the networks were made of, None for those in the folder.
    """
    processor, tokenizer = load_helpers(folder)
    try:
        calibration = read_calibration(folder, weights_sha256)
    except CalibrationError as error:
        raise CheckpointError(str(error)) from error
    start_id = generation.decoder_start_token_id
    if start_id is None:
        start_id = generation.bos_token_id
    eos = generation.eos_token_id
    if start_id is None or eos is None:
        raise CheckpointError(f"{folder}: its generation config names no decoder_start_token_id or eos_token_id")
    limit = min(networks.position_limit, settings.max_new_token_limit)
    loaded = ReadingModel(
        info=ModelInfo(
            name=name,
            hardware=hardware.label,
            runtime=networks.runtime,
            dtype=_dtype(networks, source),
            parameter_count=networks.parameter_count,
            default_decoding=_default_decoding(generation, settings.default_max_new_token_count, limit),
            max_new_token_limit=limit,
            is_default=name == settings.default_model_name,
            precision=source.precision,
            weight_bytes=networks.weight_bytes,
            languages=catalog.languages_of(name, folder, settings),
            has_class_token=networks.has_class_token,
            confidence_calibrated=calibration is not None,
            artifact=source.artifact,
            version=model_version.of_artifact(source.artifact) or model_version.of_checkpoint(folder),
        ),
        networks=networks,
        start_id=start_id,
        eos_ids=frozenset(eos if isinstance(eos, list) else [eos]),
        generation=generation,
        processor=processor,
        tokenizer=tokenizer,
        calibration=calibration,
        close=close,
    )
    _check_fixed_size(loaded, folder)
    tokens, width = _state_shape(loaded, folder)
    info = msgspec.structs.replace(loaded.info, embedding_token_count=tokens, embedding_width=width)
    return replace(loaded, info=info)


def _dtype(networks: Networks, source: Source) -> str:
    """Data type of the weights that are not rounded to integers."""
    if source.stored is not None:
        return source.precision if source.precision in ("bfloat16", "float16") else "float32"
    return str(networks.dtype).removeprefix("torch.")


def _generation(folder: Path) -> GenerationConfig:
    """The folder's generation config as transformers finds it for a model there; raises CheckpointError."""
    try:
        try:
            return GenerationConfig.from_pretrained(folder)
        except OSError:
            # Older folders have it inside config.json.
            return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)
    except Exception as error:  # a folder can be broken in any way, and the library raises whatever it met
        raise CheckpointError(f"{folder}: its generation config cannot be loaded: {_short(error)}") from error


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
