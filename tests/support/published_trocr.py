"""The TrOCR architectures that Microsoft published, with every published switch, narrow and with random weights.

Facts are from the conversion script and the configuration files of the repositories; a folder is laid out as those
are: parameter names of their time, generation defaults inside config.json, the old names of image processors, and a
tokenizer as its vocabulary files only.
"""

import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DeiTConfig,
    DeiTModel,
    GenerationConfig,
    TrOCRConfig,
    TrOCRForCausalLM,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTModel,
)

IMAGE = 64
BOS, PAD, EOS = 0, 1, 2
# What the decoder's part of config.json says of generation; the library wrote all its defaults there.
_OLD_DEFAULTS = {
    "max_length": 20,
    "min_length": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "do_sample": False,
    "early_stopping": False,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}
_SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "Straße und Gruß am Platz",
    "reading a line of handwriting",
    "thank you for your letter of the 12th",
]


@dataclass(frozen=True)
class Architecture:
    """One published shape. Widths are the published ones divided, layer and head counts are as published."""

    encoder_layers: int
    encoder_heads: int
    decoder_layers: int
    decoder_heads: int
    distilled: bool = False  # DeiT with a distillation token and biased queries, keys and values
    sentencepiece: bool = False  # tokenizer of XLM-R's kind, else RoBERTa's
    decoder: dict[str, Any] = field(default_factory=dict)


_SINUSOIDAL = {
    "tie_word_embeddings": False,
    "activation_function": "relu",
    "max_position_embeddings": 1024,
    "scale_embedding": True,
    "use_learned_position_embeddings": False,
    "layernorm_embedding": False,
}
_SMALL = Architecture(
    12,
    6,
    6,
    8,
    distilled=True,
    sentencepiece=True,
    decoder={"tie_word_embeddings": False, "scale_embedding": True, "activation_function": "relu"},
)
ARCHITECTURES = {
    "trocr-small-handwritten": _SMALL,  # printed and stage1 are the same
    "trocr-base-handwritten": Architecture(12, 12, 12, 16),  # printed and str are the same
    "trocr-base-stage1": Architecture(12, 12, 12, 16, decoder=_SINUSOIDAL),
    "trocr-large-handwritten": Architecture(24, 16, 12, 16),  # str is the same
    "trocr-large-printed": Architecture(24, 16, 12, 16, decoder=_SINUSOIDAL),  # stage1 is the same
}


def save(folder: Path, architecture: Architecture, *, seed: int = 2) -> VisionEncoderDecoderModel:
    """Write the repository's files into a folder; answers the model in memory, whose weights are the file's."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _save_sentencepiece(folder) if architecture.sentencepiece else _save_bpe(folder)
    model = _build(architecture, vocabulary, seed)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    _save_processor(folder, distilled=architecture.distilled)
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = False  # whatever the decoder says
    config["decoder"] |= _OLD_DEFAULTS | {"decoder_start_token_id": EOS, "pad_token_id": PAD, "eos_token_id": EOS}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    if not model.decoder.config.use_learned_position_embeddings:
        weights["decoder.model.decoder.embed_positions._float_tensor"] = torch.zeros(1)
    if model.decoder.config.tie_word_embeddings:
        # Converted files hold what is shared once.
        weights.pop("decoder.output_projection.weight", None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return model


def _build(architecture: Architecture, vocabulary: int, seed: int) -> VisionEncoderDecoderModel:
    torch.manual_seed(seed)
    width = 4 * architecture.encoder_heads
    shape = {
        "hidden_size": width,
        "num_hidden_layers": architecture.encoder_layers,
        "num_attention_heads": architecture.encoder_heads,
        "intermediate_size": 4 * width,
        "image_size": IMAGE,
        "patch_size": 16,
        "qkv_bias": architecture.distilled,
    }
    encoder = (
        DeiTModel(DeiTConfig(**shape), add_pooling_layer=False)
        if architecture.distilled
        else ViTModel(ViTConfig(**shape), add_pooling_layer=False)
    )
    decoder = TrOCRForCausalLM(
        TrOCRConfig(
            vocab_size=vocabulary,
            d_model=4 * architecture.decoder_heads,
            decoder_layers=architecture.decoder_layers,
            decoder_attention_heads=architecture.decoder_heads,
            decoder_ffn_dim=16 * architecture.decoder_heads,
            cross_attention_hidden_size=width,
            decoder_start_token_id=EOS,
            **architecture.decoder,
        )
    )
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    # Wide weights, so that the text depends on the image and scores lie far enough apart, yet not so wide that rounding
    # grows over two dozen layers. Where the model scales its embeddings, positions must not drown in them.
    scale = math.sqrt(model.decoder.config.d_model) if model.decoder.config.scale_embedding else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.0 if "embed" in name or "output_projection" in name else 0.3)
            if name.endswith("embed_tokens.weight"):
                parameter /= scale
    model.generation_config = GenerationConfig(
        decoder_start_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD, bos_token_id=BOS
    )
    return model.eval()


def _save_bpe(folder: Path) -> int:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _SENTENCES,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    vocabulary = json.loads((folder / "vocab.json").read_text())
    vocabulary["<mask>"] = len(vocabulary)  # the last one, as in RoBERTa's
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    _save_tokenizer_config(folder, "RobertaTokenizer", add_prefix_space=False)
    return len(vocabulary)


def _save_sentencepiece(folder: Path) -> int:
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES * 20),
        model_writer=trained,
        vocab_size=100,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "sentencepiece.bpe.model").write_bytes(trained.getvalue())
    _save_tokenizer_config(folder, "XLMRobertaTokenizer", sp_model_kwargs={})
    pieces = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue()).get_piece_size()
    # <pad> and <mask> besides, and the published decoder has 42 rows more than its tokenizer has tokens.
    return pieces + 2 + 42


def _save_tokenizer_config(folder: Path, name: str, **options: Any) -> None:
    mask = {"content": "<mask>", "lstrip": True, "normalized": True, "rstrip": False, "single_word": False}
    special = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "cls_token": "<s>",
        "mask_token": mask,
    }
    config = special | {"mask_token": mask | {"__type": "AddedToken"}, "tokenizer_class": name, **options}
    config["processor_class"] = "TrOCRProcessor"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def _save_processor(folder: Path, *, distilled: bool) -> None:
    config = {
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "DeiTFeatureExtractor" if distilled else "ViTFeatureExtractor",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3 if distilled else 2,
        "size": IMAGE,
    }
    if distilled:
        config |= {"do_center_crop": False, "crop_size": 224}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
