"""Which characters a model can write: keep them, add some, or begin anew, with what it knows about the kept ones.

Tokenizers of two kinds are understood: those with a token a character (WordLevel behind a split into characters), and
all others (BPE, Unigram), which get new characters as added tokens.
"""

import copy
import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, TrOCRForCausalLM

Choice = Literal["keep", "extend", "replace"]

# One glyph, several code points. A text is folded only where the model cannot write the left one but the right one.
FOLD = {
    "‘": "’",
    "’": "'",
    "´": "’",
    "“": '"',
    "”": '"',
    "„": '"',
    "–": "-",
    "—": "-",
    "…": "...",
    "\u00a0": " ",
    "\u202f": " ",
    "\u2009": " ",
}


@dataclass(frozen=True)
class Vocabulary:
    """What the model will be able to write. `origins` names, for each token id, the old ids whose embeddings it starts
    from (their mean); an empty tuple starts from the mean of all, with noise."""

    tokenizer: Any
    origins: tuple[tuple[int, ...], ...]
    added: tuple[str, ...]
    dropped: tuple[str, ...]

    @property
    def changed(self) -> bool:
        """Whether the model's embeddings have to change."""
        return any(origin != (token,) for token, origin in enumerate(self.origins))


def is_character_level(tokenizer: Any) -> bool:
    """Whether every character is a token of its own, and no token is longer (special ones aside)."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    special = set(tokenizer.all_special_tokens)
    return model["type"] == "WordLevel" and all(len(token) == 1 for token in model["vocab"] if token not in special)


def can_write(tokenizer: Any, text: str) -> bool:
    """Whether the text comes back from its tokens as it was."""
    ids = encode(tokenizer, text)
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        return False
    back: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return back == text or back.strip() == text.strip()


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text without start and end marks."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def writable(tokenizer: Any, characters: Iterable[str]) -> set[str]:
    """Those of the characters that the tokenizer can write. A blank counts."""
    return {one for one in characters if one == " " or can_write(tokenizer, one)}


def alphabet(texts: Iterable[str]) -> set[str]:
    """Characters of the texts, composed, and those that variants are folded to."""
    found = {character for text in texts for character in unicodedata.normalize("NFC", text)}
    return found.union(*FOLD.values())


def tidy(text: str, known: set[str]) -> str:
    """Composed characters and single blanks; a typographic variant becomes the plain one where only that is known."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    for variant, plain in FOLD.items():
        if variant not in known and set(plain) <= known:
            text = text.replace(variant, plain)
    return text


def choose(tokenizer: Any, texts: Iterable[str], choice: Choice) -> Vocabulary:
    """The vocabulary for these texts. `replace` always makes a tokenizer with a token a character."""
    wanted = sorted({character for text in texts for character in text})
    size = len(tokenizer)
    have = writable(tokenizer, wanted)
    missing = [character for character in wanted if character not in have]
    if choice == "keep" or (choice == "extend" and not missing):
        return Vocabulary(tokenizer, tuple((token,) for token in range(size)), (), ())
    if choice == "extend":
        extended = _with_characters(tokenizer, missing)
        origins = [(token,) for token in range(size)] + [_origin(tokenizer, one) for one in missing]
        return Vocabulary(extended, tuple(origins), tuple(missing), ())
    return _replaced(tokenizer, wanted)


def _with_characters(tokenizer: Any, characters: Sequence[str]) -> Any:
    if not is_character_level(tokenizer):
        extended = copy.deepcopy(tokenizer)
        extended.add_tokens(list(characters))
        return extended
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    size = len(tokenizer)
    for number, character in enumerate(characters):
        state["model"]["vocab"][character] = size + number
    return _like(tokenizer, Tokenizer.from_str(json.dumps(state)))


def _replaced(tokenizer: Any, characters: Sequence[str]) -> Vocabulary:
    special = {
        "<pad>": tokenizer.pad_token_id,
        "<s>": _first(tokenizer.bos_token_id, tokenizer.cls_token_id),
        "</s>": _first(tokenizer.eos_token_id, tokenizer.sep_token_id),
        "<unk>": tokenizer.unk_token_id,
    }
    names = [*special, *(one for one in characters if one not in special)]
    inner = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair=None, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
    )
    origins: list[tuple[int, ...]] = [() if old is None else (old,) for old in special.values()]
    origins += [_origin(tokenizer, one) for one in names[len(special) :]]
    kept = writable(tokenizer, characters)
    dropped = sorted(set(_all_characters(tokenizer)) - set(characters))
    return Vocabulary(made, tuple(origins), tuple(one for one in characters if one not in kept), tuple(dropped))


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _all_characters(tokenizer: Any) -> list[str]:
    return [token for token in tokenizer.get_vocab() if len(token) == 1 and can_write(tokenizer, token)]


def _like(tokenizer: Any, inner: Tokenizer) -> Any:
    marks = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        **marks,
    )


def _origin(tokenizer: Any, character: str) -> tuple[int, ...]:
    """Old ids that a character's embedding starts from: its own, else its base letter's, else its other case's."""
    base = unicodedata.normalize("NFD", character)[:1]
    for candidate in (character, base, character.swapcase(), base.swapcase()):
        if candidate.strip() and can_write(tokenizer, candidate):
            ids = encode(tokenizer, candidate)
            inked = [token for token in ids if tokenizer.decode([token]).strip()]  # without the mark of a word's begin
            return tuple(inked or ids)
    if character == " ":
        ids = encode(tokenizer, "a a")
        blank = [token for token in ids if tokenizer.decode([token]) == " "]
        return tuple(blank[:1])
    return ()


def resize(decoder: TrOCRForCausalLM, vocabulary: Vocabulary, ids: dict[str, int], seed: int) -> TrOCRForCausalLM:
    """The decoder with one row a token of the new vocabulary; everything else keeps its weights.

    `ids` are the config's new special ids (pad_token_id, bos_token_id, eos_token_id, decoder_start_token_id). Rows
    without an origin start at the mean of the old rows plus noise of a tenth of their spread, and a copied row of
    another character gets the same noise, so that the two can part.
    """
    config = copy.deepcopy(decoder.config)
    config.vocab_size = len(vocabulary.origins)
    for name, value in ids.items():
        setattr(config, name, value)
    fresh = TrOCRForCausalLM(config).to(dtype=decoder.dtype)
    state = dict(decoder.state_dict())
    random = torch.Generator().manual_seed(seed)
    for name in ("model.decoder.embed_tokens.weight", "output_projection.weight"):
        if name in state:
            state[name] = _rows(state[name], vocabulary.origins, random)
    if config.tie_word_embeddings:
        state["output_projection.weight"] = state["model.decoder.embed_tokens.weight"]
    fresh.load_state_dict(state)
    return fresh


def _rows(old: Tensor, origins: Sequence[tuple[int, ...]], random: torch.Generator) -> Tensor:
    mean = old.float().mean(0)
    spread = old.float().std(0)
    rows = []
    taken: set[tuple[int, ...]] = set()
    for origin in origins:
        row = old[list(origin)].float().mean(0) if origin else mean
        if not origin or origin in taken:
            row = row + 0.1 * spread * torch.randn(len(mean), generator=random)
        taken.add(origin)
        rows.append(row)
    return torch.stack(rows).to(old.dtype)


def trained_from_new(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that hold one row a token."""
    names = ("embed_tokens.weight", "output_projection.weight")
    return [parameter for name, parameter in model.named_parameters() if name.endswith(names)]
