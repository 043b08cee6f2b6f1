"""Faster layers compute what torch's own do, and touch nothing that they cannot stand for."""

import copy

import pytest
import torch
from torch import nn

from services.runtimes.torch_speed import PackedConvolution, PackedLinear, can_pack, pack_convolutions, pack_linears

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


CPU = torch.device("cpu")


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("kernel", "groups", "bias"), [(3, 1, True), (1, 1, False), (3, 2, True)])
def test_a_packed_convolution_computes_the_same_whatever_it_was_packed_for(
    kernel: int, groups: int, bias: bool, stride: int
) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(32, 64, kernel, stride, kernel // 2, groups=groups, bias=bias)
    first, second = PackedConvolution(plain), PackedConvolution(plain)
    small, large = torch.randn(1, 32, 7, 9), torch.randn(2, 32, 40, 24)
    with torch.inference_mode():
        first(small), second(large)  # from now on they are packed, each for what came first
        for pixels in (small, large):
            torch.testing.assert_close(first(pixels), plain(pixels), rtol=1e-5, atol=1e-5)
            # Else the bytes of a picture would depend on the sizes of those before it.
            assert torch.equal(first(pixels), second(pixels))


def test_a_packed_convolution_still_tells_its_weight() -> None:
    plain = nn.Conv2d(8, 16, 3)
    packed = PackedConvolution(plain)
    with torch.inference_mode():
        packed(torch.randn(1, 8, 5, 5))
    assert isinstance(packed, nn.Conv2d)  # what LoRAs look for
    assert torch.equal(packed.weight, plain.weight)


def test_only_convolutions_with_large_weights_are_packed() -> None:
    module = nn.ModuleDict(
        {
            "large": nn.Sequential(nn.Conv2d(320, 320, 3, padding=1)),
            "small": nn.Conv2d(200, 400, 3),
            "sixteen": nn.Conv2d(640, 640, 3, dtype=torch.bfloat16),
            "wrapped": nn.Conv2d(640, 640, 3, padding=1, padding_mode="circular"),
        }
    )
    pack_convolutions(module, torch.device("meta"))
    assert type(module["large"][0]) is nn.Conv2d  # type: ignore[index]
    pack_convolutions(module, CPU)
    assert type(module["large"][0]) is PackedConvolution  # type: ignore[index]
    assert {type(module[name]) for name in ("small", "sixteen", "wrapped")} == {nn.Conv2d}
