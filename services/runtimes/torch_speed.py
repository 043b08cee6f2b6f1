"""What makes torch itself faster on a processor, at the same precision.

torch multiplies float32 matrices with MKL, which is slow on other makers' processors and for a few rows on all of
them. oneDNN, which torch brings along, is faster once it has laid out the weights its own way; doing that at every
call would cost more than it gains, so it is done once. Measured on two cores of an AMD EPYC with AVX-512: 1.2 to 1.4
times the speed for the 577 rows of an encoder image, 2 to 3.6 times for 2 to 48 decoder rows, the same for one row. On
one with AVX2 alone: 0.8 to 1.0 times for an encoder image, 1.7 to 2.6 times for 8 to 16 decoder rows.

What it costs is a little exactness: oneDNN adds up all products of a row in one chain, MKL in blocks. Against float64
the rounding error of 1,024 products is twice MKL's (3.3e-7 to 1.5e-7, root mean square of standard normal inputs).
"""

import platform
from typing import Any

import torch
from torch import Tensor, nn

# What oneDNN chooses the layout for. It is used for any number of rows; layouts for 8 to 577 measured alike.
_ROWS_HINT = 16


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
