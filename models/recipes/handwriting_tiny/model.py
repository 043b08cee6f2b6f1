"""The model: a ResNet-fed vision transformer that knows positions, and a small TrOCR decoder.

The encoder is ``DPTModel`` in its hybrid form: three ResNet stages (stride 16) under a transformer with learned
positions. Convolutions learn strokes from little data; explicit positions let the decoder's attention walk along the
line, which it learned far too slowly on an encoder without any. 48 × 432 pixels become 3 × 27 tokens and a class token.

``Helpers`` holds two heads that exist in training only.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import (
    DPTConfig,
    DPTModel,
    GenerationConfig,
    ResNetConfig,
    TrOCRConfig,
    TrOCRForCausalLM,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)

from .render import HEIGHT, WIDTH
from .vocabulary import BOS, EOS, PAD, TOKENS

STRIDE = 16
ROWS, COLUMNS = HEIGHT // STRIDE, WIDTH // STRIDE
FRAMES_PER_COLUMN = 3
FRAMES = COLUMNS * FRAMES_PER_COLUMN
MAX_TOKENS = 96


def configuration() -> VisionEncoderDecoderConfig:
    """The configuration of the whole model."""
    backbone = ResNetConfig(
        num_channels=1,
        embedding_size=32,
        hidden_sizes=[32, 72, 160],
        depths=[1, 2, 2],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3"],
    )
    encoder = DPTConfig(
        is_hybrid=True,
        backbone_config=backbone,
        backbone_featmap_shape=[1, 160, ROWS, COLUMNS],
        hidden_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=512,
        image_size=[HEIGHT, WIDTH],
        # DPT reads the grid step from the first number only. The second makes the count of stored positions a square
        # (18 × 18), which DPT then interpolates to 3 × 27.
        patch_size=[STRIDE, 4],
        num_channels=1,
        layer_norm_eps=1e-6,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    decoder = TrOCRConfig(
        vocab_size=len(TOKENS),
        d_model=256,
        decoder_layers=3,
        decoder_attention_heads=4,
        decoder_ffn_dim=512,
        cross_attention_hidden_size=256,
        max_position_embeddings=MAX_TOKENS + 32,
        dropout=0.1,
        attention_dropout=0.0,
        activation_dropout=0.0,
        scale_embedding=False,
        use_learned_position_embeddings=True,
        layernorm_embedding=True,
        decoder_start_token_id=BOS,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id = BOS
    config.bos_token_id = BOS
    config.eos_token_id = EOS
    config.pad_token_id = PAD
    config.vocab_size = len(TOKENS)
    config.tie_word_embeddings = False
    return config


def generation_configuration() -> GenerationConfig:
    """Defaults of decoding: greedy, up to 95 characters and the end mark."""
    return GenerationConfig(
        decoder_start_token_id=BOS,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        max_length=MAX_TOKENS,
        num_beams=1,
        do_sample=False,
        early_stopping=False,
    )


def build() -> VisionEncoderDecoderModel:
    """A fresh model whose position table starts as sines instead of zeros."""
    config = configuration()
    encoder = DPTModel(config.encoder, add_pooling_layer=False)
    decoder = TrOCRForCausalLM(config.decoder)
    encoder.set_attn_implementation("eager")  # for training: twice as fast here as the fused kernel in bfloat16
    model = VisionEncoderDecoderModel(config=config, encoder=encoder, decoder=decoder)
    model.generation_config = generation_configuration()
    with torch.no_grad():
        table = model.encoder.embeddings.position_embeddings
        side = math.isqrt(table.shape[1] - 1)
        table[0, 1:] = _sines(side, table.shape[2])
    return model


def _sines(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of row (a quarter of the width) and column (the rest), for a square table."""
    place = torch.arange(side, dtype=torch.float32) / side

    def wave(count: int, top: float) -> torch.Tensor:
        rates = torch.exp(torch.linspace(math.log(math.pi), math.log(top), count // 2))
        return torch.cat([torch.sin(place[:, None] * rates), torch.cos(place[:, None] * rates)], dim=1)

    rows, columns = wave(width // 4, 2 * math.pi), wave(width - width // 4, math.pi * side * 0.7)
    grid = torch.cat([rows[:, None].expand(-1, side, -1), columns[None].expand(side, -1, -1)], dim=2)
    return 0.3 * grid.reshape(side * side, width)


class Helpers(nn.Module):
    """Training-only head: character logits for every thin frame along the line, read from a column of tokens.

    It is taught first which character lies under each frame (rendered lines know that), then by CTC on all lines.
    """

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.frames = nn.Linear(ROWS * width, FRAMES_PER_COLUMN * len(TOKENS))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Encoder states (with the class token first) to logits of shape batch × frames × vocabulary."""
        batch, _, width = hidden.shape
        columns = hidden[:, 1:].reshape(batch, ROWS, COLUMNS, width).permute(0, 2, 1, 3).reshape(batch, COLUMNS, -1)
        return self.frames(columns).reshape(batch, FRAMES, len(TOKENS))


def column_attention(weights: torch.Tensor) -> torch.Tensor:
    """Cross-attention (batch × heads × steps × tokens) to the share of each column, averaged over heads."""
    batch, heads, steps, _ = weights.shape
    return weights[..., 1:].reshape(batch, heads, steps, ROWS, COLUMNS).sum(3).mean(1)
