"""8-bit layers against what they are defined to compute, and the ranges that static ones round by."""

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, linear

from services.runtimes import int8
from services.runtimes.hardware import detect
from services.runtimes.input_ranges import Histogram
from services.runtimes.int8 import InputRange, Int8Weight
from services.runtimes.precision import of_cpu

RANGE = InputRange(scale=0.03, zero_point=77)

onednn_only = pytest.mark.skipif(
    detect().label != "cpu" or bool(of_cpu(torch.cpu.get_capabilities()).int8),
    reason="this machine's processor does no integer products",
)


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(5)


def products(weight: Int8Weight) -> list[int8.OneDnnProduct | int8.MatrixProduct]:
    """Every kind of integer product that runs here."""
    everywhere: list[int8.OneDnnProduct | int8.MatrixProduct] = [int8.MatrixProduct(weight)]
    runs = detect().label == "cpu" and not of_cpu(torch.cpu.get_capabilities()).int8
    return [*everywhere, int8.OneDnnProduct(weight)] if runs else everywhere


def rounded_by_largest(values: torch.Tensor, *, over: int) -> torch.Tensor:
    """Each of the first dimension, rounded to 127 steps of its largest value over the last dimensions."""
    largest = values.abs().amax(tuple(range(over, values.dim())), keepdim=True)
    # In the same order as the layers: where two codes are about equally near, the last bit decides.
    codes = (values * (127 / largest)).round()
    return codes * largest / 127


def rounded_by_range(values: torch.Tensor) -> torch.Tensor:
    codes = (values * (1 / RANGE.scale) + RANGE.zero_point).round().clamp(0, 255)
    return (codes - RANGE.zero_point) * RANGE.scale


def test_a_weight_is_rounded_by_the_largest_value_of_each_channel() -> None:
    weight = torch.randn(6, 5, 3, 3) * torch.logspace(-6, 3, 6)[:, None, None, None]
    weight[2] = 0
    rounded = Int8Weight.of(weight)
    assert rounded.values.dtype is torch.int8
    step = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    assert bool(((rounded.to_float() - weight).abs() <= step * 0.501).all())
    assert rounded.values.flatten(1).abs().amax(1).tolist() == [127, 127, 0, 127, 127, 127]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("width", "channels"), [(24, 40), (13, 7)])
def test_linear_layers_compute_what_they_are_defined_to(width: int, channels: int, bias: bool) -> None:
    layer = nn.Linear(width, channels, bias=bias)
    weight = Int8Weight.of(layer.weight)
    rows = torch.randn(3, 9, width) * 2 + 0.5
    rows[1, 4] = 0  # a row without a largest value

    def wanted(entered: torch.Tensor) -> torch.Tensor:
        return linear(entered, weight.to_float(), layer.bias)

    float_layer = int8.FloatLinear(weight, layer.bias, torch.float32)
    torch.testing.assert_close(float_layer(rows), wanted(rows), atol=1e-5, rtol=1e-4)
    for product in products(weight):
        dynamic = int8.IntegerLinear(product, layer.bias, torch.float32, None)
        torch.testing.assert_close(
            dynamic(rows), wanted(rounded_by_largest(rows, over=2).nan_to_num()), atol=1e-5, rtol=1e-4
        )
        static = int8.IntegerLinear(product, layer.bias, torch.float32, RANGE)
        torch.testing.assert_close(static(rows), wanted(rounded_by_range(rows)), atol=1e-5, rtol=1e-4)


@onednn_only
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("geometry", [{}, {"stride": 2, "padding": 1}, {"padding": (2, 0), "dilation": 2, "groups": 2}])
def test_convolutions_compute_what_they_are_defined_to(geometry: dict[str, int], bias: bool) -> None:
    layer = nn.Conv2d(6, 10, 3, bias=bias, **geometry)  # type: ignore[arg-type]
    weight = Int8Weight.of(layer.weight)
    images = torch.randn(3, 6, 12, 20) + 0.4

    def wanted(entered: torch.Tensor) -> torch.Tensor:
        return conv2d(entered, weight.to_float(), layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    float_layer = int8.FloatConv2d(layer, weight, torch.float32)
    torch.testing.assert_close(float_layer(images), wanted(images), atol=2e-5, rtol=1e-4)
    dynamic = int8.IntegerConv2d(layer, weight, torch.float32, None)
    torch.testing.assert_close(dynamic(images), wanted(rounded_by_largest(images, over=1)), atol=2e-5, rtol=1e-4)
    # The image is padded with zeros, which is not what code 0 stands for.
    static = int8.IntegerConv2d(layer, weight, torch.float32, RANGE)
    torch.testing.assert_close(static(images), wanted(rounded_by_range(images)), atol=2e-5, rtol=1e-4)


def test_a_row_is_computed_alike_in_any_company() -> None:
    layer = nn.Linear(40, 24)
    weight = Int8Weight.of(layer.weight)
    rows = torch.randn(50, 40) * torch.logspace(-3, 3, 50)[:, None]
    for product in products(weight):
        for known in (None, RANGE):
            together = int8.IntegerLinear(product, layer.bias, torch.float32, known)
            for count in (1, 2, 7, 33):
                torch.testing.assert_close(together(rows)[:count], together(rows[:count]), atol=0, rtol=1e-6)


@onednn_only
def test_an_image_is_computed_alike_in_any_company() -> None:
    layer = nn.Conv2d(3, 8, 3, padding=1)
    images = torch.randn(6, 3, 9, 11) * torch.logspace(-2, 2, 6)[:, None, None, None]
    dynamic = int8.IntegerConv2d(layer, Int8Weight.of(layer.weight), torch.float32, None)
    for number in range(6):
        alone = dynamic(images[number : number + 1])[0]
        torch.testing.assert_close(dynamic(images)[number], alone, atol=0, rtol=1e-6)


def test_numbers_that_are_none_stay_so() -> None:
    layer = nn.Linear(8, 4)
    rows = torch.ones(2, 8)
    rows[0, 3] = float("nan")
    for product in products(Int8Weight.of(layer.weight)):
        result = int8.IntegerLinear(product, layer.bias, torch.float32, None)(rows)
        assert bool(result[0].isnan().all())
        assert bool(result[1].isfinite().all())


def test_embeddings_keep_their_factor() -> None:
    table = torch.randn(7, 5)
    weight = Int8Weight.of(table)
    tokens = torch.tensor([[0, 6], [3, 3]])
    found = int8.Int8Embedding(weight, 4.0, torch.float32)(tokens)
    torch.testing.assert_close(found, weight.to_float()[tokens] * 4)


def squared_error(values: torch.Tensor, known: InputRange) -> float:
    codes = (values / known.scale + known.zero_point).round().clamp(0, 255)
    return float((((codes - known.zero_point) * known.scale - values) ** 2).mean())


def test_a_range_covers_evenly_spread_values_whole() -> None:
    histogram = Histogram()
    values = torch.rand(20_000) * 6 - 2
    histogram.add(values)
    found = histogram.input_range()
    assert -found.zero_point * found.scale == pytest.approx(-2, abs=0.1)
    assert (255 - found.zero_point) * found.scale == pytest.approx(4, abs=0.1)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_range_of_one_sign_spends_no_codes_on_the_other(sign: int) -> None:
    histogram = Histogram()
    histogram.add(torch.rand(20_000) * sign)
    found = histogram.input_range()
    assert found.zero_point == (0 if sign > 0 else 255)
    assert found.scale == pytest.approx(1 / 255, rel=0.05)


def test_a_range_cuts_off_what_is_rare() -> None:
    histogram = Histogram()
    values = torch.randn(200_000)
    values[7] = 60.0
    # In pieces of any size, with the largest value late: the histogram grows as it goes.
    for piece in (values[100:], values[10:100], values[:10]):
        histogram.add(piece)
    found = histogram.input_range()
    low, high = float(values.min()), float(values.max())
    whole = InputRange((high - low) / 255, round(-low / ((high - low) / 255)))
    assert (255 - found.zero_point) * found.scale < 50
    assert squared_error(values, found) < 0.8 * squared_error(values, whole)


def test_nothing_but_zeros_has_a_range() -> None:
    histogram = Histogram()
    histogram.add(torch.zeros(10))
    found = histogram.input_range()
    assert squared_error(torch.zeros(10), found) == 0
