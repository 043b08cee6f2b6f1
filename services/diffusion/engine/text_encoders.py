"""The text encoders of a pipeline, read chunk by chunk, with weights, and with layers left out at their end.

A prompt that is one chunk of weight 1 gets the very embeddings that diffusers' own `encode_prompt` makes of it.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from compel import EmbeddingsProvider, SplitLongTextMode

from services.diffusion.prompts.syntax import CHUNKS_MOST, Branch, Chunk, Fragment
from services.runtimes.graph_diffusion import class_name, is_compiled

Family = Literal["sd", "sdxl", "sd3", "flux"]


@dataclass(frozen=True, eq=False)
class Embeds:
    """sequence: [1, tokens, channels]; pooled: [1, channels], None for families that have none."""

    sequence: torch.Tensor
    pooled: torch.Tensor | None

    def zeros(self) -> "Embeds":
        """As large, and nothing but zeros."""
        return Embeds(torch.zeros_like(self.sequence), None if self.pooled is None else torch.zeros_like(self.pooled))


class _Reader:
    """A text encoder that remembers what it has read. It stands where compel expects a transformers model.

    skip: hidden layers left out at the end; penultimate: whether the family always leaves out one more and takes it
    without the last layer norm (SDXL, Stable Diffusion 3), as diffusers' pipelines do.
    """

    def __init__(self, encoder: Any, device: torch.device, skip: int, *, penultimate: bool) -> None:
        self.device = device
        self.dtype: torch.dtype = encoder.dtype
        self._encoder = encoder
        self._skip = skip
        self._penultimate = penultimate
        self._read: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor | None]] = {}

    def __call__(self, token_ids: torch.Tensor, attention_mask: Any = None, **options: Any) -> SimpleNamespace:
        # The pipelines attend to the padding too, so the mask is left out.
        return SimpleNamespace(last_hidden_state=self.read(token_ids)[0])

    def read(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states [1, tokens, channels] and what the encoder pools of them, for ids [1, tokens]."""
        key = tuple(token_ids[0].tolist())
        if key not in self._read:
            self._read[key] = self._encode(token_ids.to(self.device, torch.long))
        return self._read[key]

    def _encode(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self._penultimate:
            output = self._encoder(token_ids, output_hidden_states=True)
            return output.hidden_states[-(self._skip + 2)], output[0] if output[0].ndim == 2 else None
        if self._skip and is_compiled(self._encoder):
            return self._encoder.skipping(token_ids, self._skip), None
        if self._skip:
            output = self._encoder(token_ids, output_hidden_states=True)
            # Older checkpoints' classes keep the layers one level further down.
            norm = getattr(self._encoder, "text_model", self._encoder).final_layer_norm
            return norm(output.hidden_states[-(self._skip + 1)]), None
        output = self._encoder(token_ids)
        return output[0], getattr(output, "pooler_output", None)


class _Tower:
    """One tokenizer and its text encoder. length: tokens that the encoder reads at once."""

    def __init__(self, pipeline: Any, tokenizer: Any, reader: _Reader, length: int, *, truncate: bool) -> None:
        self._convert = getattr(pipeline, "maybe_convert_prompt", None)
        self._tokenizer = tokenizer
        self._reader = reader
        self._length = length
        self._provider = EmbeddingsProvider(
            tokenizer,
            reader,
            truncate=truncate,
            split_long_text_mode=SplitLongTextMode.PHRASES,
            model_max_length=length,
            device=str(reader.device),
        )

    def tokens(self, chunks: Sequence[Chunk]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and weights, both [n * length]: each chunk filled up with padding; a long one makes several."""
        parts = [self._chunk_tokens(chunk) for chunk in chunks]
        return torch.cat([ids for ids, _ in parts]), torch.cat([weights for _, weights in parts])

    def chunk_count(self, branch: Branch) -> int:
        """Chunks that it is read in; where they are more than CHUNKS_MOST, at least so many."""
        # Finding where to part takes time that grows with the square of the length, counting does not.
        texts = [fragment.text for chunk in branch.chunks for fragment in chunk]
        count = sum(map(len, self._provider.get_token_ids(texts, include_start_and_end_markers=False))) if texts else 0
        least = count // self._length
        return least if least > CHUNKS_MOST else int(self.tokens(branch.chunks)[0].shape[0]) // self._length

    def embed(self, chunks: Sequence[Chunk], chunk_count: int = 1) -> Embeds:
        """The chunks' embeddings, empty ones behind them up to `chunk_count`, and what is pooled of the first."""
        ids, weights = self.tokens(chunks)
        missing = chunk_count - ids.shape[0] // self._length
        if missing > 0:
            more = self.tokens([()] * missing)
            ids, weights = torch.cat([ids, more[0]]), torch.cat([weights, more[1]])
        sequence = self._provider.build_weighted_embedding_tensor(ids, weights, device=str(self._reader.device))
        pooled = self._reader.read(ids[: self._length].unsqueeze(0))[1]
        return Embeds(sequence.to(self._reader.dtype), pooled)

    def _chunk_tokens(self, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        texts = [self._convert(f.text, self._tokenizer) if self._convert else f.text for f in chunk]
        ids, weights, _ = self._provider.get_token_ids_and_expand_weights(
            texts, [f.weight for f in chunk], device=str(self._reader.device)
        )
        return ids, weights


class Encoders:
    """All text encoders of a pipeline, for one picture."""

    def __init__(self, pipeline: Any, family: Family, skip: int, *, device: torch.device, truncate: bool) -> None:
        self._pipeline = pipeline
        self._family = family
        self._known: dict[tuple[tuple[Chunk, ...], int, bool], Embeds] = {}
        # As in diffusers' pipelines, clip_skip is for the positive prompt alone.
        self._positive = [
            self._clip(tokenizer, encoder, device, skip, truncate) for tokenizer, encoder in clips(pipeline)
        ]
        self._negative = self._positive
        if skip:
            self._negative = [
                self._clip(tokenizer, encoder, device, 0, truncate) for tokenizer, encoder in clips(pipeline)
            ]
        self._t5: _Tower | None = None
        if (t5 := _t5(pipeline)) is not None:
            reader = _Reader(t5[1], device, 0, penultimate=False)
            # Trained on so many tokens and no more: longer prompts are cut off, chunk boundaries are spaces.
            self._t5 = _Tower(pipeline, t5[0], reader, sequence_most(pipeline), truncate=True)

    def chunk_count(self, branch: Branch) -> int:
        """Chunks that the CLIP encoders read it in."""
        return max(tower.chunk_count(branch) for tower in self._positive)

    def embed(self, branch: Branch, chunk_count: int) -> Embeds:
        """A positive prompt, filled up to so many chunks. Asked again it answers the same."""
        return self._remembered(branch, chunk_count, self._positive)

    def embed_negative(self, branch: Branch, chunk_count: int, positive: Embeds) -> Embeds:
        """A negative prompt, likewise; as long as `positive` has to be."""
        if not branch.text and self._pipeline.config.get("force_zeros_for_empty_prompt"):
            return positive.zeros()
        return self._remembered(branch, chunk_count, self._negative)

    def _clip(self, tokenizer: Any, encoder: Any, device: torch.device, skip: int, truncate: bool) -> _Tower:
        reader = _Reader(encoder, device, skip, penultimate=self._family in ("sdxl", "sd3"))
        # Flux takes nothing but the pooled embedding of the first tokens from it.
        truncate = truncate or self._family == "flux"
        return _Tower(self._pipeline, tokenizer, reader, int(tokenizer.model_max_length), truncate=truncate)

    def _remembered(self, branch: Branch, chunk_count: int, towers: list[_Tower]) -> Embeds:
        key = (branch.chunks, chunk_count, towers is self._positive)
        if key not in self._known:
            self._known[key] = self._encode(branch, chunk_count, towers)
        return self._known[key]

    def _encode(self, branch: Branch, chunk_count: int, towers: list[_Tower]) -> Embeds:
        if self._family == "flux":
            assert self._t5 is not None
            return Embeds(self._t5.embed(_as_one(branch)).sequence, towers[0].embed(_as_one(branch)).pooled)
        parts = [tower.embed(branch.chunks, chunk_count) for tower in towers]
        if self._family == "sd":
            return Embeds(parts[0].sequence, None)
        dtype = parts[-1 if self._family == "sdxl" else 0].sequence.dtype
        sequence = torch.cat([part.sequence.to(dtype) for part in parts], dim=-1)
        pooled = [part.pooled for part in parts if part.pooled is not None]
        if self._family == "sdxl":
            return Embeds(sequence, pooled[0])
        t5 = self._t5_embeds(branch, sequence)
        sequence = torch.nn.functional.pad(sequence, (0, t5.shape[-1] - sequence.shape[-1]))
        return Embeds(torch.cat([sequence, t5], dim=-2), torch.cat(pooled, dim=-1))

    def _t5_embeds(self, branch: Branch, like: torch.Tensor) -> torch.Tensor:
        if self._t5 is None:  # Stable Diffusion 3 goes without, on zeros
            channels = self._pipeline.transformer.config.joint_attention_dim
            return like.new_zeros(1, sequence_most(self._pipeline), channels)
        return self._t5.embed(_as_one(branch)).sequence


def _as_one(branch: Branch) -> tuple[Chunk]:
    """Its chunks as a single one."""
    fragments: list[Fragment] = []
    for chunk in branch.chunks:
        fragments.extend((Fragment(" "), *chunk) if fragments else chunk)
    return (tuple(fragments),)


# --- pipelines ---


def family_of(pipeline: Any) -> Family | None:
    """Which way the pipeline wants its embeddings; None for one that is not known here."""
    short, t5 = clips(pipeline), _t5(pipeline)
    if any(not class_name(encoder).startswith("CLIPTextModel") for _, encoder in short):
        return None
    denoiser = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
    kind = class_name(denoiser)
    if kind == "FluxTransformer2DModel" and len(short) == 1 and t5 is not None:
        return "flux"
    if kind == "SD3Transformer2DModel" and len(short) == 2:
        return "sd3"
    if kind != "UNet2DConditionModel" or not short or t5 is not None:
        return None
    return "sdxl" if hasattr(pipeline, "text_encoder_2") else "sd"


def clips(pipeline: Any) -> list[tuple[Any, Any]]:
    """Tokenizers and text encoders, without T5, that the pipeline has."""
    pairs = [
        (getattr(pipeline, f"tokenizer{number}", None), getattr(pipeline, f"text_encoder{number}", None))
        for number in ("", "_2", "_3")
    ]
    return [pair for pair in pairs if None not in pair and not class_name(pair[1]).startswith("T5")]


def _t5(pipeline: Any) -> tuple[Any, Any] | None:
    for number in ("_2", "_3"):
        encoder = getattr(pipeline, f"text_encoder{number}", None)
        if class_name(encoder).startswith("T5"):
            return getattr(pipeline, f"tokenizer{number}"), encoder
    return None


def sequence_most(pipeline: Any) -> int:
    """Tokens that the pipeline's T5 encoder reads, its end token included; 0 for pipelines that do not say."""
    parameter = inspect.signature(pipeline.__call__).parameters.get("max_sequence_length")
    return parameter.default if parameter is not None and isinstance(parameter.default, int) else 0
