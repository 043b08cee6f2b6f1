"""Makes the checkpoint families at reduced width: every part real, random weights, saved in the Hub's layout.

What decides how a family works is as published: kinds of blocks, conditioning, channels of the latents, scaling and
shift of the VAE, noise schedule. What decides its size is cut down: channels, layers, vocabulary, and the side of a
picture. After the config.json files of stable-diffusion-v1-5/stable-diffusion-v1-5,
stabilityai/stable-diffusion-xl-base-1.0, stabilityai/stable-diffusion-xl-refiner-1.0,
stabilityai/stable-diffusion-3-medium-diffusers and black-forest-labs/FLUX.1-dev on the Hugging Face Hub.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests.support import tiny_diffusion

SIDE = 64  # default width and height in pixels
CLIP_WIDTH = 32  # published: 768
BIG_CLIP_WIDTH = 64  # published: 1280
T5_WIDTH = 128  # published: 4096; no less than the two CLIPs together, as published
CLIP_TOKENS = 77

_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def make_sd15(folder: Path) -> Path:
    """Stable Diffusion 1.5. Published widths: U-Net 320 to 1280, VAE 128 to 512."""
    torch.manual_seed(15)
    words = clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=1,
        cross_attention_dim=CLIP_WIDTH,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    return _save(
        folder,
        StableDiffusionPipeline(
            vae=_vae(latent_channels=4, scaling_factor=0.18215),
            text_encoder=CLIPTextModel(_clip(CLIP_WIDTH, words)),
            tokenizer=words,
            unet=unet,
            scheduler=PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **_NOISE),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ),
    )


def make_sdxl(folder: Path) -> Path:
    """Stable Diffusion XL base 1.0. Published widths: U-Net 320 to 1280, text encoders 768 and 1280."""
    torch.manual_seed(100)
    words = clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=CLIP_WIDTH + BIG_CLIP_WIDTH,
        attention_head_dim=(1, 2, 4),
        transformer_layers_per_block=(1, 1, 2),
        **_sdxl_conditioning(numbers=6),
    )
    return _save(
        folder,
        StableDiffusionXLPipeline(
            vae=_sdxl_vae(),
            text_encoder=CLIPTextModel(_clip(CLIP_WIDTH, words)),
            text_encoder_2=CLIPTextModelWithProjection(_clip(BIG_CLIP_WIDTH, words, hidden_act="gelu")),
            tokenizer=words,
            tokenizer_2=words,
            unet=unet,
            scheduler=EulerDiscreteScheduler(timestep_spacing="leading", **_NOISE),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        ),
    )


def make_sdxl_refiner(folder: Path) -> Path:
    """The refiner of SDXL 1.0: one text encoder, conditioned on an aesthetics score. Published widths: 384 to 1536."""
    torch.manual_seed(101)
    words = clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=BIG_CLIP_WIDTH,
        attention_head_dim=(1, 2, 4, 4),
        transformer_layers_per_block=1,
        **_sdxl_conditioning(numbers=5),
    )
    return _save(
        folder,
        StableDiffusionXLImg2ImgPipeline(
            vae=_sdxl_vae(),
            text_encoder=None,
            text_encoder_2=CLIPTextModelWithProjection(_clip(BIG_CLIP_WIDTH, words, hidden_act="gelu")),
            tokenizer=None,
            tokenizer_2=words,
            unet=unet,
            scheduler=EulerDiscreteScheduler(timestep_spacing="leading", **_NOISE),
            requires_aesthetics_score=True,
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        ),
    )


def make_sd3(folder: Path) -> Path:
    """Stable Diffusion 3 medium with its T5. Published: 24 layers of 24 heads of 64."""
    torch.manual_seed(3)
    words = clip_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=CLIP_WIDTH + BIG_CLIP_WIDTH,
        pos_embed_max_size=24,  # published: 192 for a side of 1024 pixels
    )
    first = CLIPTextModelWithProjection(_clip(CLIP_WIDTH, words))
    # The published checkpoint projects by the unit matrix: this CLIP was trained without one.
    nn.init.eye_(first.text_projection.weight)
    return _save(
        folder,
        StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, **_NO_QUANT),
            text_encoder=first,
            tokenizer=words,
            text_encoder_2=CLIPTextModelWithProjection(_clip(BIG_CLIP_WIDTH, words, hidden_act="gelu")),
            tokenizer_2=words,
            text_encoder_3=_t5(),
            tokenizer_3=t5_tokenizer(),
        ),
    )


def make_flux(folder: Path) -> Path:
    """FLUX.1 dev. Published: 19 double and 38 single layers of 24 heads of 128."""
    torch.manual_seed(1)
    words = clip_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),  # published: 16, 56, 56; together the width of a head
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    return _save(
        folder,
        FluxPipeline(
            scheduler=scheduler,
            vae=_vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, **_NO_QUANT),
            text_encoder=CLIPTextModel(_clip(CLIP_WIDTH, words)),
            tokenizer=words,
            text_encoder_2=_t5(),
            tokenizer_2=t5_tokenizer(),
            transformer=transformer,
        ),
    )


MAKERS: dict[str, Callable[[Path], Path]] = {
    "sd15": make_sd15,
    "sdxl": make_sdxl,
    "sdxl-refiner": make_sdxl_refiner,
    "sd3": make_sd3,
    "flux": make_flux,
}


def clip_tokenizer() -> CLIPTokenizer:
    """One token a character, and as many of them as CLIP takes."""
    words = tiny_diffusion.tokenizer()
    words.model_max_length = CLIP_TOKENS
    return words


def t5_tokenizer(letters: Iterable[str] = "abcdefghijklmnopqrstuvwxyz.,-") -> T5TokenizerFast:
    """One token a character. T5's own first three tokens, and none of its 100 extra ones."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *((letter, -3.0) for letter in letters)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


_NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}


def _vae(**config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 16, 16),  # published: 128, 256, 512, 512
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIDE,
        **config,
    )


def _sdxl_vae() -> AutoencoderKL:
    return _vae(latent_channels=4, scaling_factor=0.13025, force_upcast=True)


def _sdxl_conditioning(numbers: int) -> dict[str, Any]:
    """numbers: sizes, crop and score that are embedded beside the pooled prompt."""
    width = 8  # published: 256
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": width,
        "projection_class_embeddings_input_dim": BIG_CLIP_WIDTH + numbers * width,
        "use_linear_projection": True,
    }


def _clip(width: int, words: CLIPTokenizer, hidden_act: str = "quick_gelu") -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        projection_dim=width,
        hidden_act=hidden_act,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def _t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=40,
            d_model=T5_WIDTH,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )


def _save(folder: Path, pipeline: Any) -> Path:
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder
