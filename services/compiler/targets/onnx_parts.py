"""The files that make up one ONNX graph."""

from pathlib import Path

import onnx
from onnx import external_data_helper


def onnx_parts(file: Path) -> tuple[Path, ...]:
    """The graph's file, and the files of its external weights by name."""
    model = onnx.load(str(file), load_external_data=False)
    beside = {
        external_data_helper.ExternalDataInfo(tensor).location
        for tensor in model.graph.initializer
        if external_data_helper.uses_external_data(tensor)
    }
    return (file, *(file.parent / location for location in sorted(beside)))
