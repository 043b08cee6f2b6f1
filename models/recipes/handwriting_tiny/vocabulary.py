"""The characters the model can write, and the token ids they get."""

from __future__ import annotations

import unicodedata

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<unk>"]

_ASCII = "".join(chr(code) for code in range(32, 127))
_GERMAN = "ÄÖÜäöüß"
_FRENCH = "ÀÂÇÈÉÊËÎÏÔÙÛàâçèéêëîïôùûœæ"
_NEIGHBOURS = "áíóúñãõåøÁÓÑÅØ"
_MARKS = "’€§°«»"

CHARACTERS = _ASCII + _GERMAN + _FRENCH + _NEIGHBOURS + _MARKS
TOKENS = SPECIAL_TOKENS + list(CHARACTERS)
TOKEN_ID = {token: index for index, token in enumerate(TOKENS)}

# One glyph, several code points: the model learns the plain one.
_FOLD = str.maketrans({"‘": "’", "“": '"', "”": '"', "„": '"', "–": "-", "—": "-", "…": ".", "\u00a0": " ", "´": "’"})


def normalise(text: str) -> str:
    """Composed characters, plain quotes and dashes, single spaces."""
    text = unicodedata.normalize("NFC", text).translate(_FOLD)
    return " ".join(text.split())


def encodable(text: str) -> bool:
    """Whether every character of the text has a token of its own."""
    return bool(text) and all(character in TOKEN_ID for character in text)


def encode(text: str) -> list[int]:
    """Character ids, without start and end marks."""
    return [TOKEN_ID.get(character, UNK) for character in text]


def decode(ids: list[int]) -> str:
    """The text of ids up to the first end mark, special tokens dropped."""
    out = []
    for token in ids:
        if token == EOS:
            break
        if token >= len(SPECIAL_TOKENS):
            out.append(TOKENS[token])
    return "".join(out)


def words(text: str) -> list[str]:
    """A word list written as running text."""
    return text.split()
