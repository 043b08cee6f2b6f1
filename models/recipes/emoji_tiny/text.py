"""Stage 2: the tokenizer, and the text encoder taught alone to predict latents.

This is the step that makes minutes enough: a UNet trained together with a fresh text encoder learns nothing for a long
time, because neither has anything to say to the other. Here the encoder first learns which picture a prompt means,
through two linear heads that are thrown away afterwards.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from . import common, data, vae

TOKENS = 16
WIDTH = 192
LAYERS = 4
VOCABULARY = 2048
BATCH = 96
START, END = "<|startoftext|>", "<|endoftext|>"
#: how CLIP's tokenizer splits text into words
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def prompt(name: str, style: str) -> str:
    """How a picture is asked for: the bare name means noto, other styles follow after a comma."""
    return name if style == "" else f"{name}, {style}"


def tokenizer(work: Path) -> CLIPTokenizer:
    """The tokenizer; trained once and then always loaded, because training it again may give other numbers."""
    folder = work / "tokenizer"
    if not folder.exists():
        words = [prompt(name, style) for name in data.load(work).names for style in ("", *data.STYLES)]
        bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
        bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 514, end_of_word_suffix="</w>", show_progress=False)
        bpe.train_from_iterator(words, trainer)
        merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
        # Every byte, inside and at the end of a word, so that no text is unknown.
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        pieces = dict.fromkeys([*alphabet, *(f"{c}</w>" for c in alphabet), *("".join(m) for m in merges), START, END])
        vocab = {piece: number for number, piece in enumerate(pieces)}
        made = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)
        partial = folder.with_name("tokenizer.partial")
        made.save_pretrained(partial)
        partial.replace(folder)
    return CLIPTokenizer.from_pretrained(folder)


def build(tokens: CLIPTokenizer) -> CLIPTextModel:
    """A small CLIP text encoder for that tokenizer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            hidden_act="gelu",
            # Without these, the configuration's own default (2) selects a legacy way to find the end of the text.
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
        )
    )


class Prompts:
    """Every prompt of every (style, name) pair, tokenized once, with the ways to draw random ones.

    A model that exists already needs the `tokens` it was trained with; training the tokenizer again gives others.
    """

    def __init__(self, work: Path, styles: list[str], tokens: CLIPTokenizer | None = None) -> None:
        self.tokenizer = tokens or tokenizer(work)
        self.names = data.load(work).names
        self.styles = styles
        self._ids = {style: self._encode([prompt(n, style) for n in self.names]) for style in ("", *styles)}
        self.empty = self._encode([""])[0]

    def _encode(self, texts: list[str]) -> Tensor:
        return self.tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")[
            "input_ids"
        ]

    def of(self, style: str) -> Tensor:
        """Token ids of all names in one style, as a user writes them (noto without a suffix)."""
        return self._ids["" if style == "noto" else style]

    def draw(self, pairs: Tensor, empty: float) -> Tensor:
        """Token ids for pair numbers (style * names + name); some noto prompts say so, some are left empty."""
        rows = []
        for pair in pairs.tolist():
            style, name = self.styles[pair // len(self.names)], pair % len(self.names)
            if random.random() < empty:
                rows.append(self.empty)
            else:
                bare = style == "noto" and random.random() < 0.7
                rows.append(self._ids["" if bare else style][name])
        return torch.stack(rows)


class Heads(nn.Module):
    """Two linear readings of the encoder: its end-of-text state alone, and all its states together.

    The first fills the one vector that conditions the UNet's time embedding, the second (the states of the padding
    behind the text included) the sequence its cross-attention reads.
    """

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.pooled = nn.Linear(WIDTH, outputs)
        self.sequence = nn.Linear(WIDTH * TOKENS, outputs)

    def forward(self, states: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Two predictions of the latents."""
        return self.pooled(pooled), self.sequence(states.flatten(1))


def encode(model: CLIPTextModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """All states and the end-of-text state."""
    out = model(input_ids=ids)
    return out.last_hidden_state, out.pooler_output


@torch.no_grad()
def remembered(model: CLIPTextModel, heads: Heads, prompts: Prompts, style: str, wanted: Tensor) -> dict[str, float]:
    """Share of a style's names whose predicted latents are nearest to the right ones, and the squared error."""
    ids = prompts.of(style)
    with torch.autocast("cpu", torch.bfloat16):
        guess = torch.cat([heads(*encode(model, part))[1] for part in ids.split(256)]).float()
    nearest = torch.cdist(guess, wanted).argmin(dim=1)
    right = (nearest == torch.arange(len(wanted))).float().mean()
    return {f"{style}_top1": right.item(), f"{style}_mse": (guess - wanted).square().mean().item()}


def train(work: Path, minutes: float, styles: list[str]) -> None:
    """Teach the text encoder the latents of the chosen styles; resumes from and writes `text.pt`."""
    checkpoint = work / "text.pt"
    torch.manual_seed(0)
    random.seed(0)
    prompts = Prompts(work, styles)
    latents, weights = vae.latents(work, styles)
    wanted = (latents * weights.sqrt()).flatten(1)
    per_style = dict(zip(styles, wanted.split(len(prompts.names)), strict=True))
    model, heads = build(prompts.tokenizer), Heads(wanted.shape[1])
    both = nn.ModuleList([model, heads])
    optimizer = common.Optimizer(both.named_parameters(), ("embedding", "1.pooled", "1.sequence"), 0.02, 1e-3)
    spent, steps = 0.0, 0
    if state := common.restore(checkpoint):
        both.load_state_dict(state["both"])
        optimizer.load_state_dict(state["optimizer"])
        spent, steps = state["spent"], state["steps"]
    clock = common.Clock(minutes, spent)
    saved = time.monotonic()
    losses: list[float] = []
    while clock.progress < 1:
        pairs = torch.randint(len(wanted), (BATCH,))
        with torch.autocast("cpu", torch.bfloat16):
            first, second = heads(*encode(model, prompts.draw(pairs, empty=0.02)))
        goal = wanted[pairs]
        loss = (first.float() - goal).square().mean() + (second.float() - goal).square().mean()
        loss.backward()
        optimizer.step(clock.rate())
        losses.append(loss.item())
        steps += 1
        if time.monotonic() - saved > 60 or clock.progress >= 1:
            scores: dict[str, float] = {}
            for style, part in per_style.items():
                scores |= remembered(model, heads, prompts, style, part)
            common.log(work, "text", minutes=clock.spent / 60, steps=steps, loss=sum(losses) / len(losses), **scores)
            common.save(
                checkpoint,
                {
                    "both": both.state_dict(),
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "spent": clock.spent,
                    "steps": steps,
                },
            )
            losses, saved = [], time.monotonic()
