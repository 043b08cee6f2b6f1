"""What makes torch itself faster on a processor, at the same precision.

torch multiplies float32 matrices with MKL, which is slow on other makers' processors and for a few rows on all of
them. oneDNN, which torch brings along, is faster once it has laid out the weights its own way; doing that at every
call would cost more than it gains, so it is done once. Measured on two cores of an AMD EPYC with AVX-512: 1.2 to 1.4
times the speed for the 577 rows of an encoder image, 2 to 3.6 times for 2 to 48 decoder rows, the same for one row. On
one with AVX2 alone: 0.8 to 1.0 times for an encoder image, 1.7 to 2.6 times for 8 to 16 decoder rows.

Convolutions go through oneDNN anyway, which lays out their weights anew at every call. Where these are large that is a
good part of the work: a step of Stable Diffusion 1.5's U-Net at 512x512 took 0.65 to 0.94 of the time with weights
laid out once (two cores of an AMD EPYC with AVX2), with differences of 8e-6.

What it costs is a little exactness: oneDNN adds up all products of a row in one chain, MKL in blocks. Against float64
the rounding error of 1,024 products is twice MKL's (3.3e-7 to 1.5e-7, root mean square of standard normal inputs).
"""

import platform
import threading
from typing import Any

import torch
from torch import Tensor, nn

# What oneDNN chooses the layout for. It is used for any number of rows; layouts for 8 to 577 measured alike.
_ROWS_HINT = 16
# Of float32. A network whose largest have 2.75 MiB, at 8x8 places, was as fast without.
_CONVOLUTION_BYTES_LEAST = 3 << 20


class PackedLinear(nn.Module):
    """An nn.Linear of float32 on a processor, its weight in oneDNN's layout."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # Plain attributes: nothing can move or save such a weight. The operators are those that torch's own compiler
        # emits for linear layers; they have no public name.
        self._weight: Any = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS_HINT)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, rows: Tensor) -> Tensor:
        """Float32 [..., in_features] to [..., out_features]."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return result

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def can_pack(device: torch.device) -> bool:
    """Whether packing is known to pay: only x86 processors were measured."""
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_onednn and device.type == "cpu" and platform.machine() in ("x86_64", "AMD64")


def packs_many_rows() -> bool:
    """Whether packing pays for hundreds of rows too, as an encoder has them, and not only for a decoder's few."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def pack_linears(module: nn.Module) -> None:
    """Replace every float32 nn.Linear under `module` by a packed one, in place, for inference only.

    Layers of other kinds or types stay, so what quantizes layers has to come first. A weight that another module
    shares (an output projection tied to the embedding) is copied, any other is freed.
    """
    for name, child in module.named_children():
        # Not isinstance: subclasses compute something else.
        if type(child) is nn.Linear and child.weight.dtype is torch.float32:
            setattr(module, name, PackedLinear(child))
        else:
            pack_linears(child)


class PackedConvolution(nn.Conv2d):
    """An nn.Conv2d of float32 on a processor, its weight in oneDNN's layout from the first call on.

    What it computes depends on the shape of its input alone, not on the shapes that came before. `weight` is the weight
    as it was, made anew whenever it is read, and no longer a parameter.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__(
            convolution.in_channels,
            convolution.out_channels,
            convolution.kernel_size,  # type: ignore[arg-type]  # as Conv2d itself made it: a tuple
            convolution.stride,  # type: ignore[arg-type]
            convolution.padding,  # type: ignore[arg-type]
            convolution.dilation,  # type: ignore[arg-type]
            convolution.groups,
            bias=False,
            device="meta",  # takes no memory for what is replaced at once
        )
        self.weight, self.bias = convolution.weight, convolution.bias
        self._packed: Any = None
        self._packing = threading.Lock()

    def forward(self, pixels: Tensor) -> Tensor:
        """Float32 [pictures, in_channels, rows, columns] to [pictures, out_channels, rows, columns]."""
        if self._packed is None:
            self._pack(pixels)
        # The operators are those that torch's own compiler emits; they have no public name.
        result: Tensor = torch.ops.mkldnn._convolution_pointwise(
            pixels, self._packed, self.bias, self.padding, self.stride, self.dilation, self.groups, "none", [], ""
        )
        return result

    def _pack(self, pixels: Tensor) -> None:
        with self._packing:
            if self._packed is None:
                self._packed = torch.ops.mkldnn._reorder_convolution_weight(
                    self.weight.detach(), self.padding, self.stride, self.dilation, self.groups, list(pixels.shape)
                )
                del self._parameters["weight"]

    def __getattr__(self, name: str) -> Any:
        # Only asked for what is not there: of LoRAs, before they change the layer.
        if name == "weight" and self.__dict__.get("_packed") is not None:
            return self._packed.to_dense()
        return super().__getattr__(name)


def pack_convolutions(module: nn.Module, device: torch.device) -> None:
    """Replace every float32 nn.Conv2d with a large weight under `module`, in place, for inference only.

    Nothing is done on a device where it is not known to pay.
    """
    if can_pack(device):
        _pack_below(module)


def _pack_below(module: nn.Module) -> None:
    for name, child in module.named_children():
        # Not isinstance: subclasses compute something else.
        if type(child) is nn.Conv2d and _worth_packing(child):
            setattr(module, name, PackedConvolution(child))
        else:
            _pack_below(child)


def _worth_packing(convolution: nn.Conv2d) -> bool:
    weight = convolution.weight
    return (
        weight.dtype is torch.float32
        and weight.nbytes >= _CONVOLUTION_BYTES_LEAST
        and convolution.padding_mode == "zeros"
        and not isinstance(convolution.padding, str)
    )
