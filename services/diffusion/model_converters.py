"""Protobuf to domain and back for models."""

import re
from collections.abc import Sequence
from typing import get_args

from inkwell.common.v1 import common_pb2
from inkwell.diffusion.v1 import diffusion_pb2 as pb
from inkwell.endpoint.v1 import endpoint_pb2
from services.diffusion.domain import Loading, LoadJob, ModelState, Runtime
from services.diffusion.models import ListedModel
from services.kit import faults, report
from services.kit.device import Device

_STATES: dict[ModelState, common_pb2.ModelState.ValueType] = {
    "loading": common_pb2.MODEL_STATE_LOADING,
    "ready": common_pb2.MODEL_STATE_READY,
    "unloaded": common_pb2.MODEL_STATE_UNLOADED,
}
_STAGES = {
    "waiting": pb.LOAD_STAGE_WAITING,
    "reading_weights": pb.LOAD_STAGE_READING_WEIGHTS,
    "warming": pb.LOAD_STAGE_WARMING,
}

_ARTIFACT = re.compile(r"[0-9a-f]{8,64}")


def models(listed: Sequence[ListedModel]) -> pb.ListModelsResponse:
    """The known models, the default one first."""
    return pb.ListModelsResponse(models=[model(one) for one in listed])


def to_report(device: Device, listed: Sequence[ListedModel]) -> endpoint_pb2.Report:
    """What the service says of itself to whoever routes to it."""
    return endpoint_pb2.Report(
        hardware=report.hardware(device),
        runtimes=device.runtimes,
        models=[
            endpoint_pb2.Model(
                name=one.name,
                version=one.info.version if one.info is not None else "",
                runtime=one.info.runtime.partition(" ")[0] if one.info is not None else "",
                loaded=one.state == "ready",
                memory_bytes=one.info.memory_bytes if one.info is not None else 0,
                is_default=one.is_default,
            )
            for one in listed
        ],
    )


def model(listed: ListedModel) -> pb.Model:
    """A known model; where it is and what it takes is left empty while it is unloaded."""
    message = pb.Model(
        name=listed.name,
        state=_STATES[listed.state],
        is_default=listed.is_default,
        file_bytes=listed.file_bytes,
        vaes=listed.vaes,
    )
    info = listed.info
    if info is None:
        return message
    message.MergeFrom(
        pb.Model(
            parameter_count=info.parameter_count,
            pipeline=info.pipeline,
            default_width=info.default_width,
            default_height=info.default_height,
            size_multiple=info.size_multiple,
            default_step_count=info.default_step_count,
            default_guidance_scale=info.default_guidance_scale,
            default_scheduler=info.default_scheduler,
            prompt_token_limit=info.prompt_token_limit,
            has_preview_autoencoder=info.has_preview_autoencoder,
            features=info.features,
            schedulers=info.schedulers,
        )
    )
    if listed.state == "ready":
        message.hardware, message.runtime, message.dtype = listed.hardware, listed.runtime, info.dtype
        message.memory_bytes = info.memory_bytes
        message.precision, message.artifact = info.precision, info.artifact
    return message


def load_job(request: pb.LoadModelRequest, name: str) -> LoadJob:
    """How the model of that name is to be run; raises Fault for what is no runtime or id."""
    if request.runtime and request.runtime not in get_args(Runtime):
        raise faults.invalid_field("runtime", f"{request.runtime[:40]!r} is none of: {', '.join(get_args(Runtime))}")
    if request.artifact and not _ARTIFACT.fullmatch(request.artifact):
        raise faults.invalid_field(
            "artifact", f"{request.artifact[:80]!r} is no artifact id: 64 hexadecimal digits, or at least the first 8"
        )
    if request.artifact and request.runtime == "torch":
        raise faults.invalid_field("artifact", "torch runs the checkpoint itself; leave out artifact or runtime")
    return LoadJob(name, request.runtime or None, request.artifact)  # type: ignore[arg-type]  # one of the literals


def load_progress(stage: Loading) -> pb.LoadModelResponse:
    """Where loading stands."""
    return pb.LoadModelResponse(
        progress=pb.LoadProgress(stage=_STAGES[stage.stage], evicted_models=stage.evicted_models)
    )


def load_result(listed: ListedModel) -> pb.LoadModelResponse:
    """The end of loading."""
    return pb.LoadModelResponse(result=pb.LoadResult(model=model(listed)))
