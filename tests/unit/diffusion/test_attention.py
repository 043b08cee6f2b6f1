"""What attention leaves out changes no picture, and what it makes of the prompt is computed once a picture."""

from pathlib import Path
from typing import Any

import pytest
import torch

from services.diffusion.domain import Lora
from services.diffusion.engine import attention
from tests.support import tiny_adapters, tiny_diffusion
from tests.unit.diffusion.studio import Studio, call, open_studio, parameters


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_diffusion.make_folder(tmp_path_factory.mktemp("cross") / "tiny", preview=False)


@pytest.fixture
def studio(folder: Path, tmp_path: Path) -> Studio:
    tiny_adapters.make_lora(folder, tmp_path, 1).rename(tmp_path / "style.safetensors")
    studio = open_studio(folder, lora_folder=str(tmp_path))
    attention.quicken(studio.denoiser)
    return studio


class Rows:
    """Counts how often a linear layer really multiplies."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, layers: list[Any]) -> None:
        self.count = 0
        weights = {id(layer.weight) for layer in layers}
        linear = torch.nn.functional.linear

        def counting(rows: torch.Tensor, weight: torch.Tensor, *bias: Any) -> torch.Tensor:
            self.count += id(weight) in weights
            return linear(rows, weight, *bias)

        monkeypatch.setattr(torch.nn.functional, "linear", counting)


def projections(denoiser: Any) -> list[Any]:
    """The key and value layers of every cross-attention."""
    found = [each for each in denoiser.modules() if getattr(each, "is_cross_attention", False)]
    assert found
    return [getattr(layer, "base_layer", layer) for each in found for layer in (each.to_k, each.to_v)]


def test_once_a_picture_whatever_its_steps(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = projections(studio.denoiser)
    rows = Rows(monkeypatch, layers)
    studio.paint_one(parameters())
    assert rows.count == len(layers)
    studio.paint_one(parameters(prompt="an owl"))
    assert rows.count == 2 * len(layers)


def test_a_picture_is_diffusers_own_to_the_bit(studio: Studio, folder: Path) -> None:
    asked = parameters()
    expected = call(tiny_adapters.open_pipeline(folder), asked)
    assert torch.equal(studio.paint_one(asked), expected)


def test_a_lora_counts_at_every_step_and_leaves_nothing_behind(studio: Studio) -> None:
    plain = studio.paint_one(parameters())
    styled = studio.paint_one(parameters(loras=(Lora("style", 1.0),)))
    assert not torch.equal(styled, plain)
    assert torch.equal(studio.paint_one(parameters()), plain)
    assert torch.equal(studio.paint_one(parameters(loras=(Lora("style", 1.0),))), styled)
