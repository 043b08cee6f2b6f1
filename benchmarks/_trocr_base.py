"""TrOCR-base in full size with random weights, and lines for it whose texts have known lengths."""

import io
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models
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

LENGTHS = range(8, 41)
BOS, PAD, EOS = 0, 1, 2
VOCABULARY = 50265
SIDE = 384


@dataclass(frozen=True)
class Line:
    """A picture to read and how many tokens its text has."""

    png: bytes
    token_count: int


def build() -> VisionEncoderDecoderModel:
    """The model in memory: the architecture in the config.json of microsoft/trocr-base-handwritten."""
    torch.manual_seed(0)
    encoder = ViTModel(
        ViTConfig(
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            intermediate_size=3072,
            image_size=SIDE,
            patch_size=16,
            qkv_bias=False,
        ),
        add_pooling_layer=False,
    )
    decoder = TrOCRForCausalLM(
        TrOCRConfig(
            vocab_size=VOCABULARY,
            d_model=1024,
            decoder_layers=12,
            decoder_attention_heads=16,
            decoder_ffn_dim=4096,
            cross_attention_hidden_size=768,
            max_position_embeddings=512,
            bos_token_id=BOS,
            pad_token_id=PAD,
            eos_token_id=EOS,
            decoder_start_token_id=EOS,
        )
    )
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    with torch.no_grad():
        # Of 50,265 random scores the highest is never 0, and 0 is the end token's: every text runs to its limit. The
        # embeddings are the output weights too.
        decoder.model.decoder.embed_tokens.weight[EOS] = 0.0
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=EOS
    )
    return model.eval()


def save(folder: Path, model: VisionEncoderDecoderModel) -> None:
    """Write it with its image processor and a tokenizer of as many words, as a folder that the service can be given."""
    model.save_pretrained(folder)
    ViTImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)
    words = {BOS: "<s>", PAD: "<pad>", EOS: "</s>", 3: "<unk>"}
    vocabulary = {words.get(number, f" w{number}"): number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def lines(count: int, seed: int) -> list[Line]:
    """Scribbles, each with a length out of LENGTHS, uniformly random; the same for the same seed."""
    source = random.Random(seed)
    return [Line(_scribble(source), source.choice(LENGTHS)) for _ in range(count)]


def _scribble(source: random.Random) -> bytes:
    """A PNG of a wavering pen stroke, as large as a line cut out of a scanned page."""
    width, height = source.randrange(600, 1800), source.randrange(60, 120)
    image = Image.new("RGB", (width, height), "white")
    points = [(x, source.randrange(10, height - 10)) for x in range(10, width - 10, 12)]
    ImageDraw.Draw(image).line(points, fill=(30, 30, 60), width=3, joint="curve")
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
