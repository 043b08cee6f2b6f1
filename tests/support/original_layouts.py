"""Writes a diffusers folder as one safetensors file in the layout that the family was first published in.

That is what people trade: the tensor names of the latent-diffusion code for Stable Diffusion 1.x and XL, of Stability's
own for Stable Diffusion 3. The inverse of the conversions in diffusers/loaders/single_file_utils.py.
"""

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]

_UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_SD3_TOP = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
}
_SD3_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}


def write(folder: Path, file: Path) -> Path:
    """Write the pipeline in `folder` (a Stable Diffusion 1.x, XL, XL refiner or 3) to `file`."""
    pipeline = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    if hasattr(pipeline, "unet"):
        tensors = _prefixed("model.diffusion_model.", _unet(pipeline.unet))
    else:
        tensors = _prefixed("model.diffusion_model.", _sd3(pipeline.transformer))
    tensors |= _prefixed("first_stage_model.", _vae(pipeline.vae))
    for prefix, part in _text_parts(pipeline):
        tensors |= _prefixed(prefix, part)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file)
    return file


def _text_parts(pipeline: Any) -> list[tuple[str, Tensors]]:
    first, second = pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)
    if hasattr(pipeline, "transformer"):
        t5 = pipeline.text_encoder_3.state_dict()
        return [
            ("text_encoders.clip_l.transformer.", {k: v for k, v in _clip(first).items() if "projection" not in k}),
            ("text_encoders.clip_g.transformer.", _clip(second)),
            ("text_encoders.t5xxl.transformer.", t5),
        ]
    if second is None:
        return [("cond_stage_model.transformer.", _clip(first))]
    if first is None:
        return [("conditioner.embedders.0.model.", _open_clip(second))]
    return [
        ("conditioner.embedders.0.transformer.", _clip(first)),
        ("conditioner.embedders.1.model.", _open_clip(second)),
    ]


def _prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _renamed(name: str, names: dict[str, str]) -> str:
    """The name with the entry of `names` that it begins with exchanged; as it is when there is none."""
    for old, new in names.items():
        if name.startswith(old + "."):
            return new + name[len(old) :]
    return name


def _unet(unet: Any) -> Tensors:
    layers = unet.config.layers_per_block
    each = layers + 1  # input blocks of the original a block of diffusers
    with_attention = ["CrossAttn" in kind for kind in unet.config.up_block_types]

    def original(name: str) -> str:
        match name.split(".", 4):
            case ["down_blocks", block, "resnets", layer, rest]:
                return f"input_blocks.{1 + int(block) * each + int(layer)}.0.{_renamed(rest, _UNET_RESNET)}"
            case ["down_blocks", block, "attentions", layer, rest]:
                return f"input_blocks.{1 + int(block) * each + int(layer)}.1.{rest}"
            case ["down_blocks", block, "downsamplers", "0", rest]:
                return f"input_blocks.{(int(block) + 1) * each}.0.{rest.replace('conv', 'op')}"
            case ["up_blocks", block, "resnets", layer, rest]:
                return f"output_blocks.{int(block) * each + int(layer)}.0.{_renamed(rest, _UNET_RESNET)}"
            case ["up_blocks", block, "attentions", layer, rest]:
                return f"output_blocks.{int(block) * each + int(layer)}.1.{rest}"
            case ["up_blocks", block, "upsamplers", "0", rest]:
                return f"output_blocks.{int(block) * each + layers}.{2 if with_attention[int(block)] else 1}.{rest}"
            case ["mid_block", kind, layer, *rest]:
                place = 1 if kind == "attentions" else 2 * int(layer)
                return f"middle_block.{place}.{_renamed('.'.join(rest), _UNET_RESNET)}"
        return _renamed(name, _UNET_TOP)

    return {original(name): tensor for name, tensor in unet.state_dict().items()}


def _vae(vae: Any) -> Tensors:
    count = len(vae.config.block_out_channels)
    tensors = {}
    for name, tensor in vae.state_dict().items():
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
        name = re.sub(
            r"up_blocks\.(\d+)\.(resnets|upsamplers\.0)\.",
            lambda m: f"up.{count - 1 - int(m[1])}.{'block' if m[2] == 'resnets' else 'upsample'}.",
            name,
        )
        name = re.sub(r"mid_block\.resnets\.(\d+)\.", lambda m: f"mid.block_{int(m[1]) + 1}.", name)
        if part := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)", name):
            name = f"{part[1]}.mid.attn_1.{_renamed(part[2], _VAE_ATTENTION)}"
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]  # 1 x 1 convolutions at the time
        tensors[name] = tensor
    return tensors


def _clip(encoder: Any) -> Tensors:
    """transformers' own names, all of the text model under `text_model.`"""
    return {
        name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": tensor
        for name, tensor in encoder.state_dict().items()
    }


def _open_clip(encoder: Any) -> Tensors:
    ours = {name.removeprefix("text_model."): tensor for name, tensor in _clip(encoder).items()}
    tensors = {
        "positional_embedding": ours["embeddings.position_embedding.weight"],
        "token_embedding.weight": ours["embeddings.token_embedding.weight"],
        "ln_final.weight": ours["final_layer_norm.weight"],
        "ln_final.bias": ours["final_layer_norm.bias"],
        "text_projection": ours["text_projection.weight"].T,
    }
    for name, tensor in ours.items():
        if not (layer := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)):
            continue
        place, rest = f"transformer.resblocks.{layer[1]}.", layer[2]
        if rest.startswith("self_attn.q_proj."):
            kind = rest.rpartition(".")[2]
            stem = f"encoder.layers.{layer[1]}.self_attn."
            tensors[f"{place}attn.in_proj_{kind}"] = torch.cat([ours[f"{stem}{x}_proj.{kind}"] for x in "qkv"])
        elif not rest.startswith(("self_attn.k_proj.", "self_attn.v_proj.")):
            tensors[place + _renamed(rest, _OPEN_CLIP)] = tensor
    return tensors


def _sd3(transformer: Any) -> Tensors:
    ours = transformer.state_dict()
    last = transformer.config.num_layers - 1
    tensors = {"pos_embed": ours["pos_embed.pos_embed"]}
    for name, tensor in ours.items():
        block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", name)
        if name == "pos_embed.pos_embed":
            continue
        if name.startswith("norm_out.linear."):
            tensors[name.replace("norm_out.linear", "final_layer.adaLN_modulation.1")] = _swapped(tensor)
        elif block is None:
            tensors[_renamed(name, _SD3_TOP)] = tensor
        elif (side := re.match(r"attn\.(to_q|add_q_proj)\.", block[2])) is not None:
            names = ("to_q", "to_k", "to_v") if side[1] == "to_q" else ("add_q_proj", "add_k_proj", "add_v_proj")
            kind = name.rpartition(".")[2]
            stem = f"transformer_blocks.{block[1]}.attn."
            where = "x_block" if side[1] == "to_q" else "context_block"
            joined = torch.cat([ours[f"{stem}{part}.{kind}"] for part in names])
            tensors[f"joint_blocks.{block[1]}.{where}.attn.qkv.{kind}"] = joined
        elif not re.match(r"attn\.(to_k|to_v|add_k_proj|add_v_proj)\.", block[2]):
            # The last block's context ends there, and its modulation has halves only, the other way round.
            swapped = int(block[1]) == last and block[2].startswith("norm1_context.")
            tensors[f"joint_blocks.{block[1]}.{_renamed(block[2], _SD3_BLOCK)}"] = (
                _swapped(tensor) if swapped else tensor
            )
    return tensors


def _swapped(tensor: Tensor) -> Tensor:
    return torch.cat(list(reversed(tensor.chunk(2))))
