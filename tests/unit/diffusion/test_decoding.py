"""Decoding in tiles and in float32, as one lane asks, with nothing left behind on the VAE that all share."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from services.diffusion.domain import Vae
from services.diffusion.engine import decoding, lanes
from services.diffusion.engine.decoding import Decoding


@pytest.fixture
def vae(folders: dict[str, Path]) -> Iterator[Any]:
    """In bfloat16, behind the gate."""
    vae = diffusers.AutoencoderKL.from_pretrained(folders["plain"] / "vae", dtype=torch.bfloat16).eval()
    decoding.open_gate(vae)
    with torch.no_grad():
        yield vae


def decoded(vae: Any, how: Decoding) -> torch.Tensor:
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)).to(vae.dtype)
    lane = lanes.Lane(lambda: vae.decode(latents, return_dict=False)[0], decoding=how)
    lane.advance()
    assert lane.finished
    result: torch.Tensor = lane.result
    return result


def overflows_in_16_bits(vae: Any) -> None:
    vae.decoder.register_forward_hook(
        lambda module, args, output: output * float("nan") if output.dtype != torch.float32 else output
    )


def test_what_16_bits_cannot_hold_is_decoded_again_in_float32(vae: Any) -> None:
    sound = decoded(vae, Decoding(Vae(upcast=True)))
    overflows_in_16_bits(vae)
    how = Decoding(None)
    mended = decoded(vae, how)
    assert how.repaired
    assert torch.equal(mended, sound)
    assert vae.dtype == torch.bfloat16


def test_upcast_asks_for_float32_at_once(vae: Any) -> None:
    overflows_in_16_bits(vae)
    how = Decoding(Vae(upcast=True))
    assert torch.isfinite(decoded(vae, how)).all()
    assert not how.repaired


def test_a_sound_decode_is_left_alone(vae: Any) -> None:
    how = Decoding(None)
    assert decoded(vae, how).dtype == torch.bfloat16
    assert not how.repaired


def test_tiles_are_for_the_lane_that_asks(vae: Any) -> None:
    whole, tiled = decoded(vae, Decoding(None)), decoded(vae, Decoding(Vae(tiled=True)))
    assert whole.shape == tiled.shape
    assert not torch.equal(whole, tiled)
    assert torch.equal(decoded(vae, Decoding(None)), whole)


def test_other_callers_notice_nothing(vae: Any) -> None:
    overflows_in_16_bits(vae)
    latents = torch.zeros(1, 4, 4, 4, dtype=torch.bfloat16)
    assert torch.isnan(vae.decode(latents, return_dict=False)[0]).all()
