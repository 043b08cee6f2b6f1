"""From latents to pixels: tiles where a call wants them, and float32 where 16 bits do not reach.

A model's VAE is shared by all its pictures, so what one of them asks for is set for the length of one decode, which
nothing interrupts, and taken back.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from services.diffusion.domain import Vae
from services.diffusion.engine import lanes


class Decoding:
    """How one picture's latents are decoded. upcast: asked for, or found to be needed."""

    def __init__(self, vae: Vae | None) -> None:
        self.tiled = vae is not None and vae.tiled
        self.upcast = vae is not None and vae.upcast
        self.repaired = False  # a decode gave values that are no numbers, and float32 mended it


def open_gate(vae: Any) -> None:
    """Let the VAE's `decode` follow the `Decoding` of the lane that calls it; other callers notice nothing.

    Twice on the same VAE is once.
    """
    if hasattr(vae, "_inkwell_plain_decode"):
        return
    plain: Callable[..., Any] = vae.decode
    vae._inkwell_plain_decode = plain

    @functools.wraps(plain)
    def decode(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        decoding = lanes.current_decoding()
        if decoding is None:
            return plain(latents, *args, **kwargs)
        if decoding.tiled:
            vae.enable_tiling()
        try:
            if decoding.upcast:
                return _in_float32(vae, plain, latents, args, kwargs)
            decoded = plain(latents, *args, **kwargs)
            if vae.dtype == torch.float32 or bool(torch.isfinite(_sample(decoded)).all()):
                return decoded
            decoding.repaired = True
            return _in_float32(vae, plain, latents, args, kwargs)
        finally:
            if decoding.tiled:
                vae.disable_tiling()

    vae.decode = decode


def _in_float32(vae: Any, plain: Callable[..., Any], latents: Tensor, args: Any, kwargs: Any) -> Any:
    dtype = vae.dtype
    vae.to(torch.float32)
    try:
        return plain(latents.float(), *args, **kwargs)
    finally:
        vae.to(dtype)  # 16-bit weights lose nothing on the way there and back


def _sample(decoded: Any) -> Tensor:
    sample: Tensor = decoded[0] if isinstance(decoded, tuple) else decoded.sample
    return sample
