"""Adapters with random weights for the tiny pipelines, in the layouts in which people find real ones."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, StableDiffusionPipeline, T2IAdapter
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

RANK = 4
ALPHA = 16  # not the rank, so that losing it shows
DENOISER_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]


def open_pipeline(folder: Path) -> Any:
    """The pipeline of a folder, quiet."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_lora(base: Path, folder: Path, seed: int) -> Path:
    """A LoRA of U-Net and text encoder as diffusers saves it: matrices in peft's names, alpha in the metadata."""
    torch.manual_seed(seed)
    pipeline = open_pipeline(base)
    parts = {"unet": (pipeline.unet, DENOISER_LAYERS), "text_encoder": (pipeline.text_encoder, TEXT_LAYERS)}
    layers: dict[str, Any] = {}
    for name, (part, targets) in parts.items():
        # False: both matrices random, so that the LoRA changes something.
        part.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights=False, target_modules=targets))
        matrices = get_peft_model_state_dict(part)
        # The file's own dialect for text encoders.
        layers[f"{name}_lora_layers"] = matrices if name == "unet" else convert_state_dict_to_diffusers(matrices)
        layers[f"{name}_lora_adapter_metadata"] = part.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(folder, **layers)
    return folder / "pytorch_lora_weights.safetensors"


def make_kohya_lora(lora: Path, file: Path) -> Path:
    """The same LoRA under the names of kohya's trainer: underscores, down and up, an alpha a layer."""
    renamed: dict[str, torch.Tensor] = {}
    for key, value in load_file(lora).items():
        part, rest = key.split(".", 1)
        for old, new in ((".lora_A.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_up.weight")):
            rest = rest.replace(old, new)
        rest = rest.replace(".lora.down.", ".lora_down.").replace(".lora.up.", ".lora_up.")
        rest = rest.replace(".lora_linear_layer.down.", ".lora_down.").replace(".lora_linear_layer.up.", ".lora_up.")
        module, _, matrix = rest.partition(".lora_")
        if part == "text_encoder":
            module = f"text_model.{module.removeprefix('text_model.')}"
        prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part] + module.replace(".", "_")
        renamed[f"{prefix}.lora_{matrix}"] = value
        renamed[f"{prefix}.alpha"] = torch.tensor(float(ALPHA))
    save_file(renamed, file)
    return file


def make_foreign_lora(file: Path, *, width: int = 2048) -> Path:
    """A LoRA as made for Stable Diffusion XL."""
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    second = "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"
    save_file(
        {
            f"{layer}.lora_A.weight": torch.zeros(RANK, width),
            f"{layer}.lora_B.weight": torch.zeros(640, RANK),
            f"{second}.lora_linear_layer.down.weight": torch.zeros(RANK, 1280),
            f"{second}.lora_linear_layer.up.weight": torch.zeros(1280, RANK),
        },
        file,
    )
    return file


def make_embedding(file: Path, *, width: int = 32, count: int = 2, seed: int = 1, key: str = "emb_params") -> Path:
    """A textual inversion embedding of `count` vectors."""
    torch.manual_seed(seed)
    save_file({key: torch.randn(count, width)}, file)
    return file


def make_controlnet(base: Path, folder: Path, seed: int, **changes: Any) -> Path:
    """A ControlNet for the base's U-Net that steers hard. changes: of its config."""
    torch.manual_seed(seed)
    unet = open_pipeline(base).unet
    if changes:
        control = ControlNetModel.from_config(dict(ControlNetModel.from_unet(unet).config) | changes)
    else:
        control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 16, 32))
    for name, weight in control.named_parameters():
        if "controlnet_" in name:  # zero convolutions until it is trained
            torch.nn.init.normal_(weight, std=0.3)
    control.save_pretrained(folder, safe_serialization=True)
    return folder


def make_t2i_adapter(folder: Path, seed: int, *, channels: tuple[int, ...] = (16, 32), kind: str = "xl") -> Path:
    """A T2I-Adapter; "xl" puts its first features where a U-Net that begins without attention adds them."""
    torch.manual_seed(seed)
    full, factor = ("full_adapter_xl", 16) if kind == "xl" else ("full_adapter", 8)
    T2IAdapter(
        in_channels=3, channels=list(channels), num_res_blocks=1, downscale_factor=factor, adapter_type=full
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def make_image_encoder(folder: Path, *, projection: int = 24) -> Path:
    """A CLIP vision model for pictures of 16 pixels."""
    torch.manual_seed(20261122)
    CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
            projection_dim=projection,
        )
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def make_ip_adapter(base: Path, file: Path, seed: int, *, projection: int = 24, width: int = 32) -> Path:
    """A plain IP-Adapter in the published layout: image_proj, and to_k_ip and to_v_ip a cross-attention."""
    torch.manual_seed(seed)
    unet = open_pipeline(base).unet
    tensors = {
        "image_proj.proj.weight": torch.randn(4 * width, projection),
        "image_proj.proj.bias": torch.randn(4 * width),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }
    layers = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(layers):
        inner = unet.get_submodule(name.removesuffix(".processor")).inner_dim
        for side in ("to_k_ip", "to_v_ip"):
            tensors[f"ip_adapter.{2 * number + 1}.{side}.weight"] = torch.randn(inner, width)
    save_file(tensors, file)
    return file


def damage(file: Path) -> Path:
    """Cut the end off."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3])
    return file


def write_config(folder: Path, **config: Any) -> Path:
    """A model folder that is nothing but its config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
