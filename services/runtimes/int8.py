"""Layers with 8-bit weights, put in the place of a model's linear, convolution and embedding layers.

A weight is int8 with one float32 scale an output channel (an embedding: a row): weight = values * scale, symmetric,
-127 to 127. What goes into a layer is treated in one of three ways:

- weight-only: it stays floating point, and so does the product;
- dynamic: each row (a convolution: each image) is rounded to 8 bits by its own largest value;
- static: everything is rounded to 8 bits by one range that was measured beforehand.

Under dynamic and static the product is one of integers. In all three a row's result does not depend on the other rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear, pad

Activations = Literal["float", "dynamic", "static"]

_LARGEST = 127
# Of the largest value of a row or channel: one that is all zeros must not divide by zero.
_LEAST = 1e-30
# Of the codes under dynamic rounding, which is symmetric.
_MIDDLE = 128
# From here to its double, float32 holds the integers and nothing between.
_SHIFT = 2.0**23


@dataclass(frozen=True)
class Int8Weight:
    """A weight in 8 bits. `values` is int8 [channels, ...], `scale` float32 [channels]."""

    values: Tensor
    scale: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> "Int8Weight":
        """Round a floating-point weight [channels, ...], each channel by its own largest value."""
        rows = weight.detach().float().flatten(1)
        scale = rows.abs().amax(1).clamp_min_(_LEAST) / _LARGEST
        values = (rows / scale[:, None]).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)
        return cls(values.view(weight.shape), scale)

    def to_float(self) -> Tensor:
        """The weight that is computed with, float32 [channels, ...]."""
        return self.values * self.scale.view(-1, *[1] * (self.values.dim() - 1))


@dataclass(frozen=True)
class InputRange:
    """How an input is rounded under "static": a value is (code - zero_point) * scale, with codes 0 to 255."""

    scale: float
    zero_point: int


def quantizable(model: Any) -> dict[str, nn.Module]:
    """The layers of a VisionEncoderDecoderModel that get 8-bit weights, by name.

    Those are nearly all weights: positions, norms and biases stay floating point.
    """
    tokens = model.decoder.get_input_embeddings()
    found = {}
    for name, module in model.named_modules():
        # Not isinstance: subclasses compute something else.
        plain_convolution = (
            type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        )
        if type(module) is nn.Linear or plain_convolution or module is tokens:
            found[name] = module
    return found


def round_weights(model: Any, known: Mapping[str, Int8Weight] | None = None) -> dict[str, Int8Weight]:
    """8-bit weights of the quantizable layers by name; those in `known` are taken from there, the rest is rounded.

    Layers that share a weight share its rounded one.
    """
    rounded: dict[int, Int8Weight] = {}
    result = {}
    for name, module in quantizable(model).items():
        weight: Any = module.weight
        if id(weight) not in rounded:
            rounded[id(weight)] = (known or {}).get(name) or Int8Weight.of(weight)
        result[name] = rounded[id(weight)]
    return result


def replace_layers(
    model: Any,
    weights: Mapping[str, Int8Weight],
    activations: Activations,
    *,
    dtype: torch.dtype,
    ranges: Mapping[str, InputRange] | None = None,
    onednn: bool,
) -> None:
    """Put 8-bit layers in the place of those named in `weights`, in place, for inference only.

    dtype: of what goes into the layers and comes out. ranges: the inputs of the layers under "static"; a layer without
    one keeps floating-point inputs. onednn: whether the integer products are oneDNN's (x86 processors) or torch's own
    (`_int_mm`, for GPUs, where convolutions keep floating-point inputs).
    """
    tokens = model.decoder.get_input_embeddings()
    counted: set[int] = set()
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        input_range = (ranges or {}).get(name)
        fresh: Int8Layer
        if layer is tokens:
            fresh = Int8Embedding(weight, float(getattr(layer, "embed_scale", 1.0)), dtype)
        elif activations == "float" or (activations == "static" and input_range is None):
            fresh = _float_layer(layer, weight, dtype)
        elif isinstance(layer, nn.Conv2d):
            fresh = IntegerConv2d(layer, weight, dtype, input_range) if onednn else _float_layer(layer, weight, dtype)
        else:
            product = OneDnnProduct(weight) if onednn else MatrixProduct(weight)
            fresh = IntegerLinear(product, layer.bias, dtype, input_range)
        fresh.weight_count = 0 if id(weight) in counted else weight.values.numel()
        fresh.weight_count += 0 if fresh.bias is None else fresh.bias.numel()
        counted.add(id(weight))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, fresh)


class Int8Layer(nn.Module):
    """What the layers have in common."""

    # Empty: for those who ask a layer's weight for its device and type, as the library does.
    weight: Tensor
    bias: Tensor | None
    weight_count: int  # weights in it, without those that are another layer's too and counted there
    packed_bytes: int = 0  # memory of weights that no buffer shows, because oneDNN has laid them out its own way

    def __init__(self, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(0, dtype=dtype), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach())


class Int8Embedding(Int8Layer):
    """Looks rows up and scales them."""

    def __init__(self, weight: Int8Weight, factor: float, dtype: torch.dtype) -> None:
        """factor: what the model multiplies its embeddings with."""
        super().__init__(None, dtype)
        self.values: Tensor
        self.scale: Tensor
        self.register_buffer("values", weight.values)
        self.register_buffer("scale", (weight.scale * factor)[:, None])

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [...] to float [..., width]."""
        return (self.values[tokens] * self.scale[tokens]).to(self.weight.dtype)


class FloatLinear(Int8Layer):
    """Weight-only: the values become floating point for the product, the scales follow it."""

    def __init__(self, weight: Int8Weight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(bias, dtype)
        self.values: Tensor
        self.scale: Tensor
        self.register_buffer("values", weight.values)
        self.register_buffer("scale", weight.scale.to(dtype))

    def forward(self, rows: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        product = linear(rows, self.values.to(rows.dtype))
        return product.mul_(self.scale) if self.bias is None else torch.addcmul(self.bias, product, self.scale)


class FloatConv2d(Int8Layer):
    """Weight-only, as FloatLinear."""

    def __init__(self, layer: nn.Conv2d, weight: Int8Weight, dtype: torch.dtype) -> None:
        super().__init__(layer.bias, dtype)
        self.values: Tensor
        self.scale: Tensor
        self.register_buffer("values", weight.values)
        self.register_buffer("scale", weight.scale.to(dtype)[:, None, None])
        self._geometry: Any = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def forward(self, images: Tensor) -> Tensor:
        """[images, in, height, width] to [images, out, height, width]."""
        product = conv2d(images, self.values.to(images.dtype), None, *self._geometry)
        product = product.mul_(self.scale)
        return product if self.bias is None else product.add_(self.bias[:, None, None])


class IntegerLinear(Int8Layer):
    """Static with a range, dynamic without."""

    def __init__(
        self,
        product: "OneDnnProduct | MatrixProduct",
        bias: Tensor | None,
        dtype: torch.dtype,
        known: InputRange | None,
    ) -> None:
        super().__init__(None if bias is None else bias.float(), dtype)
        self._product = product
        self._range = known
        self.packed_bytes = product.packed_bytes

    def forward(self, rows: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        flat = rows.reshape(-1, rows.shape[-1]).float()
        if self._range is not None:
            codes = _codes_in(self._range, flat)
            result = self._product(codes, self._range.scale, self._range.zero_point, self.bias)
        else:
            largest = flat.abs().amax(1, keepdim=True).clamp_min_(_LEAST)
            codes = _codes((flat * (_LARGEST / largest)).add_(_SHIFT + _MIDDLE))
            result = self._product(codes, 1 / _LARGEST, _MIDDLE, None)
            result = result.mul_(largest) if self.bias is None else torch.addcmul(self.bias, result, largest)
        return result.view(*rows.shape[:-1], -1).to(rows.dtype)


class IntegerConv2d(Int8Layer):
    """Static with a range, dynamic without; oneDNN's."""

    def __init__(self, layer: nn.Conv2d, weight: Int8Weight, dtype: torch.dtype, known: InputRange | None) -> None:
        super().__init__(None if layer.bias is None else layer.bias.float(), dtype)
        self._range = known
        self._zero_point = _MIDDLE if known is None else known.zero_point
        self._input_scale = 1 / _LARGEST if known is None else known.scale
        self._geometry: Any = tuple(map(list, (layer.stride, layer.padding, layer.dilation)))
        self._geometry = (*self._geometry, layer.groups)
        self._weight_scale = weight.scale
        self._weight_zeros = torch.zeros(weight.scale.shape, dtype=torch.int32)
        self._packed = torch.ops.onednn.qconv_prepack(
            weight.values, weight.scale, self._input_scale, self._zero_point, *self._geometry
        )
        self.packed_bytes = weight.values.numel() + weight.scale.numel() * 4

    def forward(self, images: Tensor) -> Tensor:
        """[images, in, height, width] to [images, out, height, width]."""
        if self._range is not None:
            return self._product(_codes_in(self._range, images), self.bias)
        largest = images.abs().amax((1, 2, 3), keepdim=True).clamp_min_(_LEAST)
        codes = _codes((images * (_LARGEST / largest)).add_(_SHIFT + _MIDDLE))
        result = self._product(codes, None).mul_(largest)
        return result if self.bias is None else result.add_(self.bias[:, None, None])

    def _product(self, codes: Tensor, bias: Tensor | None) -> Tensor:
        result: Tensor = torch.ops.onednn.qconv_pointwise(
            codes,
            self._input_scale,
            self._zero_point,
            self._packed,
            self._weight_scale,
            self._weight_zeros,
            bias,
            *self._geometry,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return result


class OneDnnProduct:
    """Integer rows times an 8-bit weight by oneDNN, on x86 processors.

    The operators are those that torch's own compiler emits for quantized models; they have no public name. oneDNN has
    fast kernels for unsigned inputs only: with int8 ones the same operator is a thousand times slower.
    """

    def __init__(self, weight: Int8Weight) -> None:
        self._packed = torch.ops.onednn.qlinear_prepack(weight.values.contiguous(), None)
        self._scale = weight.scale
        self._zeros = torch.zeros(weight.scale.shape, dtype=torch.int32)
        self.packed_bytes = weight.values.numel() + weight.scale.numel() * 4

    def __call__(self, codes: Tensor, scale: float, zero_point: int, bias: Tensor | None) -> Tensor:
        """uint8 [rows, in] to float32 [rows, out]: (codes - zero_point) * scale times the weight, plus the bias."""
        result: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes,
            scale,
            zero_point,
            self._packed,
            self._scale,
            self._zeros,
            bias,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return result


class MatrixProduct(nn.Module):
    """Integer rows times an 8-bit weight by `torch._int_mm`, which GPUs have too."""

    packed_bytes = 0

    def __init__(self, weight: Int8Weight) -> None:
        super().__init__()
        self._channels, self._width = weight.values.shape
        self.values: Tensor
        self.scale: Tensor
        self.sums: Tensor
        # cuBLAS wants both sides to be multiples of 8.
        self.register_buffer("values", pad(weight.values, (0, -self._width % 8, 0, -self._channels % 8)))
        self.register_buffer("scale", weight.scale)
        self.register_buffer("sums", weight.values.sum(1, dtype=torch.int32))

    def forward(self, codes: Tensor, scale: float, zero_point: int, bias: Tensor | None) -> Tensor:
        """As OneDnnProduct."""
        rows = codes.shape[0]
        signed = codes.bitwise_xor(128).view(torch.int8)  # codes - 128
        # It wants more than 16 rows, and fewer kinds of sizes are faster.
        signed = pad(signed, (0, -self._width % 8, 0, max(32, rows + -rows % 8) - rows))
        product = torch._int_mm(signed, self.values.t())[:rows, : self._channels]
        if zero_point != _MIDDLE:
            product = product + (_MIDDLE - zero_point) * self.sums
        result = product * (self.scale * scale)
        return result if bias is None else result.add_(bias)


def _codes(shifted: Tensor) -> Tensor:
    """The uint8 codes in float32 numbers of _SHIFT + code.

    What brought them there rounded them, and the code is the lowest byte. Converting to uint8 directly takes longer
    than the product that follows: torch does not vectorize that conversion.
    """
    return shifted.view(torch.int32).to(torch.uint8)


def _codes_in(known: InputRange, values: Tensor) -> Tensor:
    shifted = torch.mul(values, 1 / known.scale).add_(_SHIFT + known.zero_point)
    return _codes(shifted.clamp_(_SHIFT, _SHIFT + 255))


def _float_layer(layer: Any, weight: Int8Weight, dtype: torch.dtype) -> Int8Layer:
    if isinstance(layer, nn.Conv2d):
        return FloatConv2d(layer, weight, dtype)
    return FloatLinear(weight, layer.bias, dtype)
