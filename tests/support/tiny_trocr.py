"""A small TrOCR-style folder with random weights: real in every part, reads nonsense, needs no training.

Random networks tend to repeat one token whatever they see. Wide weights make these depend on the image and on every
token before, end at different lengths, and keep the scores far enough apart for exact comparisons.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    TrOCRConfig,
    TrOCRForCausalLM,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

PAD, BOS, EOS, UNK = range(4)
CHARACTERS = "abcdefghijklmnopqrstuvwxyz .-ß"
HEIGHT, WIDTH = 16, 64


def build(
    *,
    channels: int = 1,
    learned_positions: bool = True,
    layers: int = 2,
    positions: int = 48,
    qkv_bias: bool = True,
    seed: int = 0,
) -> VisionEncoderDecoderModel:
    """The model in memory, in evaluation mode."""
    torch.manual_seed(seed)
    encoder = ViTModel(
        ViTConfig(
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=48,
            image_size=(HEIGHT, WIDTH),
            patch_size=8,
            num_channels=channels,
            qkv_bias=qkv_bias,
        ),
        add_pooling_layer=False,
    )
    decoder = TrOCRForCausalLM(
        TrOCRConfig(
            vocab_size=4 + len(CHARACTERS),
            d_model=32,
            decoder_layers=layers,
            decoder_attention_heads=4,
            decoder_ffn_dim=64,
            max_position_embeddings=positions,
            use_learned_position_embeddings=learned_positions,
            scale_embedding=not learned_positions,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
            decoder_start_token_id=BOS,
        )
    )
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.0 if "embed" in name else 0.35)
        # Makes the end token a frequent choice (the embeddings are the output weights too).
        model.decoder.model.decoder.embed_tokens.weight[EOS] *= 1.5
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, decoder_start_token_id=BOS
    )
    return model.eval()


def save(folder: Path, model: VisionEncoderDecoderModel, **generation: Any) -> Path:
    """Write model, image processor, tokenizer and generation config as a folder that the service can be given."""
    channels = model.config.encoder.num_channels
    model.generation_config.update(**generation)
    model.save_pretrained(folder)
    ViTImageProcessorPil(
        size={"height": HEIGHT, "width": WIDTH}, image_mean=[0.5] * channels, image_std=[0.5] * channels
    ).save_pretrained(folder)
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder
