"""Protobuf to domain and back for models and embeddings."""

import re
from collections.abc import Sequence
from typing import get_args

from inkwell.common.v1 import common_pb2
from inkwell.endpoint.v1 import endpoint_pb2
from inkwell.ocr.v1 import ocr_pb2
from services.kit import faults, report
from services.kit.device import Device
from services.ocr.converters import decoding_options
from services.ocr.domain import (
    Embedding,
    EmbedJob,
    Line,
    Loading,
    LoadJob,
    ModelInfo,
    ModelState,
    Precision,
    Runtime,
)
from services.ocr.models import ListedModel
from services.ocr.settings import Settings

_STATES: dict[ModelState, common_pb2.ModelState.ValueType] = {
    "loading": common_pb2.MODEL_STATE_LOADING,
    "ready": common_pb2.MODEL_STATE_READY,
    "unloaded": common_pb2.MODEL_STATE_UNLOADED,
}
_PRECISIONS: dict[int, Precision | None] = {
    ocr_pb2.PRECISION_UNSPECIFIED: None,
    ocr_pb2.PRECISION_FLOAT32: "float32",
    ocr_pb2.PRECISION_BFLOAT16: "bfloat16",
    ocr_pb2.PRECISION_FLOAT16: "float16",
    ocr_pb2.PRECISION_INT8_DYNAMIC: "int8_dynamic",
    ocr_pb2.PRECISION_INT8_WEIGHT_ONLY: "int8_weight_only",
    ocr_pb2.PRECISION_INT8_STATIC: "int8_static",
    ocr_pb2.PRECISION_INT4_WEIGHT_ONLY: "int4_weight_only",
}
_PRECISIONS_OUT = {value: ocr_pb2.Precision.ValueType(number) for number, value in _PRECISIONS.items()}
_STAGES = {
    "waiting": ocr_pb2.LOAD_STAGE_WAITING,
    "reading_weights": ocr_pb2.LOAD_STAGE_READING_WEIGHTS,
    "warming": ocr_pb2.LOAD_STAGE_WARMING,
}
_POOLINGS = {
    ocr_pb2.POOLING_UNSPECIFIED: "mean",
    ocr_pb2.POOLING_MEAN: "mean",
    ocr_pb2.POOLING_CLS: "cls",
    ocr_pb2.POOLING_NONE: "none",
}
_DTYPES = {
    common_pb2.TENSOR_TYPE_UNSPECIFIED: "float32",
    common_pb2.TENSOR_TYPE_FLOAT32: "float32",
    common_pb2.TENSOR_TYPE_FLOAT16: "float16",
}
_ARTIFACT = re.compile(r"[0-9a-f]{8,64}")
_NUMBER_BYTES = {"float32": 4, "float16": 2}


def models(listed: Sequence[ListedModel]) -> ocr_pb2.ListModelsResponse:
    """The known models, the default one first."""
    return ocr_pb2.ListModelsResponse(models=[model(one) for one in listed])


def model(listed: ListedModel) -> ocr_pb2.Model:
    """A known model; what a loaded one computes with is left empty while it is unloaded."""
    message = ocr_pb2.Model(
        name=listed.name,
        state=_STATES[listed.state],
        is_default=listed.is_default,
        languages=listed.languages,
        weight_bytes=listed.file_bytes,
    )
    info = listed.info
    if info is None:
        return message
    message.MergeFrom(
        ocr_pb2.Model(
            parameter_count=info.parameter_count,
            default_decoding=decoding_options(info.default_decoding),
            max_new_token_limit=info.max_new_token_limit,
            confidence_calibrated=info.confidence_calibrated,
            embedding_width=info.embedding_width,
        )
    )
    if listed.state != "unloaded":
        message.hardware, message.runtime, message.dtype = info.hardware, info.runtime, info.dtype
        message.weight_bytes = info.weight_bytes
    if listed.state == "ready":
        message.precision = _PRECISIONS_OUT[info.precision]
        message.artifact = info.artifact
    return message


def to_report(device: Device, listed: Sequence[ListedModel]) -> endpoint_pb2.Report:
    """What the service says of itself to whoever routes to it."""
    return endpoint_pb2.Report(
        hardware=report.hardware(device),
        runtimes=device.runtimes,
        models=[
            endpoint_pb2.Model(
                name=one.name,
                version=one.info.version if one.info is not None else "",
                runtime=one.info.runtime if one.info is not None else "",
                loaded=one.state == "ready",
                memory_bytes=one.info.weight_bytes if one.info is not None else 0,
                is_default=one.is_default,
            )
            for one in listed
        ],
    )


def loaded(info: ModelInfo) -> ocr_pb2.Model:
    """A model that was just loaded."""
    return model(ListedModel(info.name, "ready", info.is_default, info.languages, 0, info))


def load_job(request: ocr_pb2.LoadModelRequest) -> LoadJob:
    """How the model is to be run; raises Fault for what is no precision, runtime or id."""
    if request.precision not in _PRECISIONS:
        raise _no_such_value("precision", request.precision, ocr_pb2.Precision.items())
    if request.runtime and request.runtime not in get_args(Runtime):
        raise faults.invalid_field("runtime", f"{request.runtime[:40]!r} is none of: {', '.join(get_args(Runtime))}")
    if request.artifact and not _ARTIFACT.fullmatch(request.artifact):
        raise faults.invalid_field(
            "artifact", f"{request.artifact[:80]!r} is no artifact id: 64 hexadecimal digits, or at least the first 8"
        )
    if request.artifact and request.runtime == "torch":
        raise faults.invalid_field("artifact", "torch runs the checkpoint itself; leave out artifact or runtime")
    return LoadJob(
        request.name,
        _PRECISIONS[request.precision],
        request.runtime or None,  # type: ignore[arg-type]  # one of the literals
        request.artifact,
    )


def load_progress(stage: Loading) -> ocr_pb2.LoadModelResponse:
    """Where loading stands."""
    return ocr_pb2.LoadModelResponse(
        progress=ocr_pb2.LoadProgress(stage=_STAGES[stage.stage], evicted_models=stage.evicted_models)
    )


def load_result(info: ModelInfo, *, elapsed_ms: float) -> ocr_pb2.LoadModelResponse:
    """The end of loading."""
    return ocr_pb2.LoadModelResponse(result=ocr_pb2.LoadResult(model=loaded(info), elapsed_ms=round(elapsed_ms)))


def check_embed(request: ocr_pb2.EmbedRequest, settings: Settings) -> None:
    """Raise Fault for what is wrong with a request whatever its model is."""
    count, limit = len(request.images), settings.embed_image_limit
    if not count:
        raise faults.invalid_field("images", f"there are none; 1 to {limit} are accepted")
    if count > limit:
        raise faults.too_large(
            "images", "TOO_MANY_IMAGES", f"{count} images are more than the limit of {limit} a call", limit=limit
        )
    if request.pooling not in _POOLINGS:
        raise _no_such_value("pooling", request.pooling, ocr_pb2.Pooling.items())
    if request.dtype not in _DTYPES:
        raise _no_such_value("dtype", request.dtype, common_pb2.TensorType.items())


def embed_job(
    request: ocr_pb2.EmbedRequest, info: ModelInfo, settings: Settings, lines: tuple[Line, ...] = ()
) -> EmbedJob:
    """What the engine is to do for a checked request; raises Fault for what this model cannot answer."""
    job = EmbedJob(
        info.name,
        lines,
        _POOLINGS[request.pooling],  # type: ignore[arg-type]  # one of the literals
        _DTYPES[request.dtype],  # type: ignore[arg-type]
        request.normalize,
    )
    if job.pooling == "cls" and not info.has_class_token:
        raise faults.failed_precondition(
            "NO_CLASS_TOKEN",
            f"the encoder of {info.name} has no class token; ask for POOLING_MEAN or POOLING_NONE",
            model=info.name,
        )
    states = info.embedding_token_count if job.pooling == "none" else 1
    size = len(request.images) * states * info.embedding_width * _NUMBER_BYTES[job.dtype]
    if size > settings.embed_reply_bytes_limit:
        raise faults.too_large(
            "images",
            "EMBEDDING_TOO_LARGE",
            f"the answer for {len(request.images)} images would take {size} bytes and the limit is"
            f" {settings.embed_reply_bytes_limit}; send fewer, or ask for float16 or a pooling",
            size_bytes=size,
            limit_bytes=settings.embed_reply_bytes_limit,
        )
    return job


def embedding(made: Embedding, info: ModelInfo, *, queue_ms: float, engine_ms: float) -> ocr_pb2.EmbedResponse:
    """The answer of Embed."""
    dtype = common_pb2.TENSOR_TYPE_FLOAT16 if made.dtype == "float16" else common_pb2.TENSOR_TYPE_FLOAT32
    return ocr_pb2.EmbedResponse(
        embeddings=common_pb2.Tensor(content=made.content, dtype=dtype, shape=made.shape),
        model=info.name,
        timing=common_pb2.Timing(queue_ms=queue_ms, engine_ms=engine_ms),
    )


def _no_such_value(field: str, value: int, values: Sequence[tuple[str, int]]) -> faults.Fault:
    accepted = ", ".join(f"{name} ({number})" for name, number in values)
    return faults.invalid_field(field, f"{value} is none of: {accepted}")
