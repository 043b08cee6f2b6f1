"""Textual inversion embeddings of one model.

Each vector of an embedding gets a row of its own at the end of the text encoders' tables and a token that nobody types;
in a prompt the embedding's word is exchanged for its tokens. So what stands for the word never depends on how the
tokenizer cuts it up, another prompt that happens to contain its letters is read as ever, and the rows and tokens that
were there before stay as they are.
"""

import re
import secrets
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from safetensors.torch import load_file
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from services.diffusion.adapters_catalog import embedding_pattern, spelled
from services.diffusion.engine.adapter_files import Unfit, Unusable, header_of

# Letters and digits alone, so that whatever reads weights and brackets in a prompt lets it pass; random, so that no
# prompt has it by itself.
_TOKEN = "zq" + secrets.token_hex(6) + "{:04d}qz"
_ANY_TOKEN = re.compile(_TOKEN.replace("{:04d}", r"(\d{4})"))
# Which of a file's tensors is for which encoder of a model with two.
_NAMES_OF_PAIR = ("clip_l", "clip_g")
_ROWS_MOST = 10_000
_LEGACY_END = 2


class Embeddings:
    """Names are unique among those loaded; the same row serves another embedding once one is dropped."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline_class = type(pipeline).__name__
        self._encoders = _encoders(pipeline)
        self._rows_of: dict[str, list[int]] = {}
        self._free: list[int] = []
        self._count = 0

    def load(self, name: str, file: Path) -> None:
        """Read an embedding. Raises Unfit or Unusable."""
        vectors = self._vectors(file)
        needed = len(vectors[0])
        rows = self._free[:needed]
        if self._count + needed - len(rows) > _ROWS_MOST:
            raise Unusable(f"it has {needed} vectors; all embeddings together may have {_ROWS_MOST}")
        del self._free[:needed]
        rows += range(self._count, self._count + needed - len(rows))
        self._count = max(self._count, rows[-1] + 1)
        for (tokenizer, encoder), table in zip(self._encoders, vectors, strict=True):
            for row, vector in zip(rows, table, strict=True):
                _write(tokenizer, encoder, row, vector)
        self._rows_of[name] = rows

    def drop(self, name: str) -> None:
        """Forget an embedding."""
        self._free += self._rows_of.pop(name)

    def laid_in(self, prompt: str, names: Collection[str]) -> str:
        """The prompt with the words of these embeddings, which must be loaded, exchanged for their tokens."""
        pattern = embedding_pattern(names)
        if pattern is None:
            return prompt

        def tokens(match: re.Match[str]) -> str:
            word = match["name"]
            if not word:
                return match[0]
            return " ".join(_TOKEN.format(row) for row in self._rows_of[spelled(word, names)])

        return pattern.sub(tokens, prompt)

    def readable(self, text: str) -> str:
        """Text that came out of a tokenizer, with the embeddings' tokens exchanged back for their words."""
        name_of = {row: name for name, rows in self._rows_of.items() for row in rows}
        words = _ANY_TOKEN.sub(lambda match: f" \0{name_of.get(int(match[1]), '')}\0 ", text)
        # Vectors of one embedding stand side by side and are one word.
        words = re.sub(r"\0(.*?)\0(?:\s*\0\1\0)*", r"\1", words)
        return re.sub(r" {2,}", " ", words).strip()

    def _vectors(self, file: Path) -> list[Tensor]:
        """Vectors [count, width] for each text encoder."""
        header = header_of(file)
        if not self._encoders:
            raise Unfit(f"diffusers puts no embedding into {self._pipeline_class}")
        shapes = {name: tensor.shape for name, tensor in header.items()}
        names = _assign(shapes, [_table(encoder).shape[1] for _, encoder in self._encoders])
        tensors = load_file(file)
        found = [tensors[name].reshape(-1, shapes[name][-1]) for name in names]
        if len({len(table) for table in found}) != 1:
            raise Unusable("it has different numbers of vectors for the text encoders")
        if not all(bool(torch.isfinite(table).all()) for table in found):
            raise Unusable("it holds values that are not numbers")
        return found


def _encoders(pipeline: Any) -> list[tuple[Any, Any]]:
    """The tokenizers and text encoders that take embeddings; none unless all of the pipeline's do."""
    pairs = [
        (getattr(pipeline, f"tokenizer{suffix}", None), getattr(pipeline, f"text_encoder{suffix}", None))
        for suffix in ("", "_2", "_3")
    ]
    pairs = [pair for pair in pairs if pair[1] is not None]
    clip = all(isinstance(encoder, CLIPTextModel | CLIPTextModelWithProjection) for _, encoder in pairs)
    return pairs if clip and isinstance(pipeline, TextualInversionLoaderMixin) else []


def _assign(shapes: Mapping[str, tuple[int, ...]], widths: list[int]) -> list[str]:
    """Which of the file's tensors is for which encoder. Raises Unfit or Unusable."""
    described = ", ".join(f"{name[:40]} {'x'.join(map(str, shape))}" for name, shape in list(shapes.items())[:4])
    vectors = {name: shape for name, shape in shapes.items() if len(shape) in (1, 2) and shape[0]}
    pair = [name for name in _NAMES_OF_PAIR if name in vectors]
    names = pair if len(vectors) == len(pair) else list(vectors)
    if len(vectors) != len(shapes) or len(names) not in (1, len(_NAMES_OF_PAIR)):
        raise Unusable(
            f"it is no embedding: it holds {described}; one table of vectors is expected, or clip_l and clip_g"
        )
    theirs = [vectors[name][-1] for name in names]
    if theirs != widths:
        raise Unfit(
            f"its vectors are {' and '.join(map(str, theirs))} wide; this model's text encoders take"
            f" {' and '.join(map(str, widths))}"
        )
    return names


def _table(encoder: Any) -> nn.Parameter:
    weight: nn.Parameter = encoder.get_input_embeddings().weight
    return weight


def _write(tokenizer: Any, encoder: Any, row: int, vector: Tensor) -> None:
    token = _TOKEN.format(row)
    tokenizer.add_tokens(AddedToken(token, normalized=False, special=False))
    place = tokenizer.convert_tokens_to_ids(token)
    embedding = encoder.get_input_embeddings()
    table = embedding.weight.data
    if place >= len(table):
        more = table.new_zeros(place + 1 - len(table), table.shape[1])
        embedding.weight = nn.Parameter(torch.cat([table, more]), requires_grad=False)
        embedding.num_embeddings = len(embedding.weight)
    embedding.weight.data[place] = vector.to(table)
    # Older checkpoints take the highest token for the end of the text, which holds as long as none is added. Where the
    # end is known it stands at the same place.
    for module in encoder.modules():
        if getattr(module, "eos_token_id", None) == _LEGACY_END:
            module.eos_token_id = tokenizer.eos_token_id
