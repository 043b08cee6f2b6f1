"""Embedding: requests and tensors."""

from collections.abc import Sequence

from inkwell import types
from inkwell.common.v1 import common_pb2
from inkwell.converters import shared
from inkwell.errors import InternalError
from inkwell.ocr.v1 import ocr_pb2

_POOLINGS = {"mean": ocr_pb2.POOLING_MEAN, "cls": ocr_pb2.POOLING_CLS, "none": ocr_pb2.POOLING_NONE}
_DTYPES = {"float32": common_pb2.TENSOR_TYPE_FLOAT32, "float16": common_pb2.TENSOR_TYPE_FLOAT16}
_DTYPE_NAMES = {number: name for name, number in _DTYPES.items()}


def embed_request(
    contents: Sequence[bytes], *, model: str, pooling: str, dtype: str, normalize: bool
) -> ocr_pb2.EmbedRequest:
    """Raises InvalidRequest for a pooling or dtype that there is not."""
    request = ocr_pb2.EmbedRequest(
        pooling=shared.choice("pooling", pooling, _POOLINGS),  # type: ignore[arg-type]  # one of its numbers
        dtype=shared.choice("dtype", dtype, _DTYPES),  # type: ignore[arg-type]
        normalize=normalize,
    )
    shared.assign(request, "model", model)
    for content in contents:
        request.images.add(content=content)
    return request


def embeddings(message: ocr_pb2.EmbedResponse, served: types.ServedBy) -> types.Embeddings:
    """Raises InternalError for a tensor that makes no sense."""
    tensor = message.embeddings
    try:
        return types.Embeddings(
            content=tensor.content,
            dtype=_DTYPE_NAMES.get(tensor.dtype, f"type {tensor.dtype}"),
            shape=tuple(tensor.shape),
            model=message.model,
            timing=shared.timing(message.timing),
            served_by=served,
        )
    except ValueError as error:
        raise InternalError(f"the server answered with no tensor: {error}", reason="BAD_TENSOR") from None
