"""The model that training starts from, and which of its parameters learn."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer, VisionEncoderDecoderConfig, VisionEncoderDecoderModel

from services.ocr.finetune.vocabulary import Choice, Vocabulary, choose, resize, trained_from_new
from services.runtimes import checkpoints, torch_trocr
from services.runtimes.checkpoints import CheckpointError
from services.runtimes.hardware import Hardware


@dataclass
class Base:
    """A loaded model with its image processor and tokenizer."""

    source: str
    model: VisionEncoderDecoderModel
    processor: Any
    tokenizer: Any
    channels: int
    start_id: int
    pad_id: int
    eos_id: int
    position_limit: int  # tokens it can write at most, end mark included


def load(source: str) -> Base:
    """Load what the service could load, in float32; raises CheckpointError with what is wrong with it."""
    folder = checkpoints.fetch(checkpoints.resolve(source))
    model = torch_trocr.load(folder, device="cpu", precision="float32", hardware=Hardware("cpu", "cpu", "CPU", 0, 1))
    try:
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - a folder can be broken in any way, and the library raises what it met
        raise CheckpointError(f"{source}: its image processor or tokenizer cannot be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise CheckpointError(f"{source}: its tokenizer has no tokenizer.json; save it once as a fast tokenizer")
    if "height" not in processor.size or "width" not in processor.size:
        raise CheckpointError(f"{source}: its image processor answers no fixed size: {processor.size}")
    generation = model.generation_config
    start = generation.decoder_start_token_id
    start = generation.bos_token_id if start is None else start
    eos = generation.eos_token_id
    eos = eos[0] if isinstance(eos, list) else eos
    pad = generation.pad_token_id
    pad = tokenizer.pad_token_id if pad is None else pad
    if start is None or eos is None or pad is None:
        raise CheckpointError(f"{source}: its generation config names no start, end or padding token")
    channels = int(getattr(model.config.encoder, "num_channels", 3))
    limit = int(model.decoder.config.max_position_embeddings)
    return Base(source, model, processor, tokenizer, channels, start, pad, eos, limit)


def with_vocabulary(base: Base, texts: list[str], choice: Choice, seed: int) -> Vocabulary:
    """Give the base the vocabulary that the choice makes of these texts, in place; answers what changed."""
    vocabulary = choose(base.tokenizer, texts, choice)
    if not vocabulary.changed:
        return vocabulary
    tokenizer = vocabulary.tokenizer
    if choice == "replace":
        base.start_id, base.eos_id, base.pad_id = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = {
        "pad_token_id": base.pad_id,
        "bos_token_id": base.start_id,
        "eos_token_id": base.eos_id,
        "decoder_start_token_id": base.start_id,
    }
    model = base.model
    model.decoder = resize(model.decoder, vocabulary, ids, seed)
    model.config.decoder = model.decoder.config
    for name, value in ids.items():
        setattr(model.config, name, value)
        setattr(model.generation_config, name, value)
    model.config.vocab_size = len(vocabulary.origins)
    generation = model.generation_config
    # Rules about single tokens of the old vocabulary mean nothing in the new one.
    if choice == "replace":
        for name in ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id"):
            setattr(generation, name, None)
        generation.forced_eos_token_id = None
    base.tokenizer = tokenizer
    return vocabulary


def forget(base: Base, seed: int) -> None:
    """Random weights on the same architecture, in place: what training from scratch starts from."""
    torch.manual_seed(seed)
    generation = base.model.generation_config
    # Through a dictionary: a loaded configuration insists on the attention of the whole for each part.
    base.model = VisionEncoderDecoderModel(VisionEncoderDecoderConfig.from_dict(base.model.config.to_dict()))
    base.model.tie_weights()
    base.model.generation_config = generation


def freeze(model: VisionEncoderDecoderModel, what: str, *, learn_tokens: bool) -> None:
    """Stop parameters from learning: "none", "encoder", "decoder" or "all-but-top-N" (decoder layers, and output).

    `learn_tokens` lets the rows of tokens learn whatever is frozen, because some are new. Parameters that no reading
    uses (the encoder's pooler) never learn. Raises ValueError for anything else.
    """
    top = re.fullmatch(r"all-but-top-(\d+)", what)
    layers = len(model.decoder.model.decoder.layers)
    if what not in ("none", "encoder", "decoder") and top is None:
        raise ValueError(f"{what!r} is none of none, encoder, decoder, all-but-top-N")
    if top and not 1 <= int(top[1]) <= layers:
        raise ValueError(f"all-but-top-{top[1]}: the decoder has {layers} layers; N is from 1 to {layers}")
    model.requires_grad_(True)
    if what in ("encoder",) or top:
        model.encoder.requires_grad_(False)
        if getattr(model, "enc_to_dec_proj", None) is not None and top:
            model.enc_to_dec_proj.requires_grad_(False)
    if what == "decoder":
        model.decoder.requires_grad_(False)
    if top:
        model.decoder.requires_grad_(False)
        for layer in model.decoder.model.decoder.layers[layers - int(top[1]) :]:
            layer.requires_grad_(True)
        model.decoder.output_projection.requires_grad_(True)
    if learn_tokens:
        for parameter in trained_from_new(model):
            parameter.requires_grad_(True)
    for name, parameter in model.encoder.named_parameters():
        if name.startswith("pooler."):
            parameter.requires_grad_(False)


def still_modules(model: VisionEncoderDecoderModel, *, learn_statistics: bool) -> list[nn.Module]:
    """Modules that stay in evaluation mode while the rest trains.

    Those without a learning parameter (their dropout would only add noise), and, unless `learn_statistics`, all batch
    normalisations: the statistics of a few lines are worse than those of the base.
    """
    still = []
    for module in model.modules():
        parameters = list(module.parameters())
        frozen = bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
        running = isinstance(module, nn.modules.batchnorm._BatchNorm) and not learn_statistics
        if frozen or running:
            still.append(module)
    return still


def counts(model: nn.Module) -> tuple[int, int]:
    """Parameters that learn, and all of them."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, learns in sizes if learns), sum(size for size, _ in sizes)
