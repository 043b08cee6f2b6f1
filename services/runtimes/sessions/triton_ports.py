"""What a model's configuration tells Inkwell beyond what Triton needs: the names of the axes, and which build it is.

The compiler writes it into config.pbtxt (services.compiler.targets.triton), the session reads it from the server.
"""

import msgspec

from services.runtimes.artifacts.manifest import Axis, Port

# `parameters` of a model's configuration that Triton's backends do not read.
PORTS_PARAMETER = "inkwell_ports"  # Ports as JSON
IDENTITY_PARAMETER = "inkwell_sha256"  # of the graph's file and the weights beside it

# Triton's names of element types by numpy's ("Datatypes" in Triton's model configuration documentation).
_TRITON_DTYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    "bfloat16": "BF16",
}
_DTYPES = {triton: dtype for dtype, triton in _TRITON_DTYPES.items()}


class Ports(msgspec.Struct, frozen=True):
    """A graph's inputs and outputs with the names that Triton's own metadata loses."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    axes: tuple[Axis, ...]


def triton_dtype(dtype: str) -> str | None:
    """ "float32" -> "FP32"; None for what Triton has no name for."""
    return _TRITON_DTYPES.get(dtype)


def port_dtype(triton: str) -> str | None:
    """ "FP32" -> "float32"; None for types that no tensor of ours has, such as BYTES."""
    return _DTYPES.get(triton)
