"""Faster linear layers compute what torch's own do, and touch nothing that they cannot stand for."""

import copy

import pytest
import torch
from torch import nn

from services.runtimes.torch_speed import PackedLinear, can_pack, pack_linears

pytestmark = pytest.mark.skipif(not can_pack(torch.device("cpu")), reason="no oneDNN for this processor")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 40), (5, 40), (2, 577, 40)], ids=str)
def test_a_packed_layer_computes_the_same(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(40, 70, bias=bias)
    rows = torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear)(rows), linear(rows), rtol=1e-5, atol=1e-6)


def test_rows_that_are_not_contiguous_are_read_in_their_order() -> None:
    linear = nn.Linear(6, 3)
    rows = torch.randn(6, 9).t()
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear)(rows), linear(rows), rtol=1e-5, atol=1e-6)


class _Doubling(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_only_plain_float32_layers_are_packed() -> None:
    module = nn.ModuleDict(
        {
            "plain": nn.Sequential(nn.Linear(4, 4)),
            "bfloat16_layer": nn.Linear(4, 4, dtype=torch.bfloat16),
            "subclass": _Doubling(4, 4),
        }
    )
    pack_linears(module)
    assert isinstance(module["plain"], nn.Sequential)
    assert isinstance(module["plain"][0], PackedLinear)
    assert type(module["bfloat16_layer"]) is nn.Linear
    assert type(module["subclass"]) is _Doubling


def test_a_tied_weight_stays_with_the_module_that_shares_it() -> None:
    embedding = nn.Embedding(10, 4)
    head = nn.Linear(4, 10, bias=False)
    head.weight = embedding.weight
    module = nn.ModuleDict({"embedding": embedding, "head": head})
    plain = copy.deepcopy(module)
    pack_linears(module)
    with torch.inference_mode():
        hidden = module["embedding"](torch.arange(10))
        torch.testing.assert_close(hidden, plain["embedding"](torch.arange(10)))
        torch.testing.assert_close(module["head"](hidden), plain["head"](hidden), rtol=1e-5, atol=1e-6)
