"""Write the trained parts as a diffusers folder, fp16 safetensors, all at once or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from . import common, preview, text, unet, vae

LIMIT_BYTES = 30_000_000


def clip_files(folder: Path) -> None:
    """Add vocab.json and merges.txt, which readers older than tokenizer.json look for."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


def export(work: Path) -> Path:
    """Export what the checkpoints hold; a part whose stage has not run yet gets fresh weights. Returns the folder."""
    torch.manual_seed(0)
    tokens = text.tokenizer(work)
    denoiser, encoder, tiny = unet.build(), text.build(tokens), preview.build()
    if state := common.restore(work / "unet.pt"):
        both = torch.nn.ModuleDict({"unet": denoiser, "text": encoder})
        both.load_state_dict(state["average"])
    elif state := common.restore(work / "text.pt"):
        encoder.load_state_dict(state["model"])
    if state := common.restore(work / "preview.pt"):
        tiny.load_state_dict(state["average"])
    autoencoder = vae.finished(work)
    if state := common.restore(work / "polish.pt"):
        autoencoder.load_state_dict(state["average"])
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=encoder,
        tokenizer=tokens,
        unet=denoiser,
        scheduler=unet.schedule(),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    ).to(torch.float16)
    partial, final, old = work / "export.partial", work / "export", work / "export.old"
    for folder in (partial, old):
        shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(partial, safe_serialization=True)
    clip_files(partial / "tokenizer")
    tiny.half().save_pretrained(partial / "preview_autoencoder", safe_serialization=True)
    config = partial / "preview_autoencoder" / "config.json"
    # AutoencoderTiny writes this key for itself but warns about it when it loads.
    kept = {key: value for key, value in json.loads(config.read_text()).items() if key != "block_out_channels"}
    config.write_text(json.dumps(kept, indent=2) + "\n")
    size = sum(f.stat().st_size for f in partial.rglob("*") if f.is_file())
    common.log(work, "export", bytes=size)
    if size >= LIMIT_BYTES:
        raise ValueError(f"the export has {size} bytes, the limit is {LIMIT_BYTES}")
    if final.exists():
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    return final
