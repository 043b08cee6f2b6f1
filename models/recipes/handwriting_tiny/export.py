"""Write a model as a folder that plain ``from_pretrained`` calls load: weights (fp16), tokenizer, image processor."""

from __future__ import annotations

import argparse
import copy
import os
import shutil
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, TrOCRProcessor, VisionEncoderDecoderModel, ViTImageProcessorPil

from .model import MAX_TOKENS, generation_configuration
from .render import HEIGHT, WIDTH
from .vocabulary import BOS, EOS, SPECIAL_TOKENS, TOKEN_ID

STEM = "encoder.embeddings.backbone.embedder.embedder.convolution.weight"


def tokenizer() -> PreTrainedTokenizerFast:
    """A character tokenizer: every character is a word, and decoding glues them together."""
    inner = Tokenizer(WordLevel(dict(TOKEN_ID), unk_token="<unk>"))
    inner.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = Fuse()
    inner.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair=None, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    pad, bos, eos, unk = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def image_processor() -> ViTImageProcessorPil:
    """RGB (of grey), squashed to the model's size, -1..1."""
    return ViTImageProcessorPil(
        do_resize=True,
        size={"height": HEIGHT, "width": WIDTH},
        resample=2,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        do_convert_rgb=True,
    )


def shipped(model: VisionEncoderDecoderModel) -> VisionEncoderDecoderModel:
    """The model as others expect it: fp16, three colour channels, and the (unused) pooler the model class wants.

    Training sees grey only. Spreading the first convolution evenly over three channels gives the same numbers for grey
    images given as RGB, which is what callers of TrOCR models send.
    """
    config = copy.deepcopy(model.config)
    config.encoder.num_channels = 3
    config.encoder.backbone_config.num_channels = 3
    wide = VisionEncoderDecoderModel(config=config)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state[STEM] = state[STEM].expand(-1, 3, -1, -1) / 3
    missing, unexpected = wide.load_state_dict(state, strict=False)
    if unexpected or any("pooler" not in name for name in missing):
        raise ValueError(f"weights do not fit: missing {missing}, unexpected {unexpected}")
    torch.nn.init.zeros_(wide.encoder.pooler.dense.weight)
    torch.nn.init.zeros_(wide.encoder.pooler.dense.bias)
    wide.generation_config = generation_configuration()
    return wide.eval().to(torch.float16)


def export(model: VisionEncoderDecoderModel, folder: Path) -> None:
    """Save to a folder beside the target first, then swap, so readers never see half a model."""
    fresh = folder.with_name(folder.name + ".fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    shipped(model).save_pretrained(fresh)
    TrOCRProcessor(image_processor=image_processor(), tokenizer=tokenizer()).save_pretrained(fresh)
    for path in fresh.iterdir():
        path.chmod(0o644)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    """Export the averaged weights of a training checkpoint."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    from .model import build

    model = build()
    model.load_state_dict(torch.load(arguments.checkpoint, map_location="cpu", weights_only=True)["average"])
    export(model, arguments.out)


if __name__ == "__main__":
    main()
