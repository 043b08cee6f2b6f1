"""Compiling, and what comes of it."""

from typing import Any

from inkwell import types
from inkwell.compiler.v1 import compiler_pb2
from inkwell.converters import operation, shared
from inkwell.errors import invalid

_TARGETS = shared.by_number(compiler_pb2.Target, "TARGET_", types.Target)
_TARGET_NUMBERS = shared.by_name(_TARGETS)
_PRECISIONS = shared.by_number(compiler_pb2.Precision, "PRECISION_", types.Precision)
_PRECISION_NUMBERS = shared.by_name(_PRECISIONS)
_PAGE_SIZE = 200


def compile_request(model: str, target: str, options: types.CompileOptions) -> compiler_pb2.CompileRequest:
    """Raises InvalidRequest for a name or type that the request does not have."""
    unknown = options.keys() - types.CompileOptions.__optional_keys__
    if unknown:
        raise TypeError(f"compile() has no option {min(unknown)!r}")
    request = compiler_pb2.CompileRequest()
    shared.assign(request, "model", model)
    shared.assign(request, "target", shared.choice("target", target, _TARGET_NUMBERS))
    shared.assign(request, "precision", precision_number("precision", options.get("precision")))
    for name in ("hardware", "max_batch_size", "max_side_px", "request_id"):
        shared.assign(request, name, options.get(name))
    for component, precision in (options.get("component_precisions") or {}).items():
        field = f"component_precisions[{component!r}]"
        request.component_precisions[component] = compiler_pb2.Precision.ValueType(precision_number(field, precision))
    for pattern in shared.several("excluded_layers", options.get("excluded_layers", ())):
        if not isinstance(pattern, str):
            raise invalid("excluded_layers", f"a text expected, not {pattern!r}")
        request.excluded_layers.append(pattern)
    for name in ("character_error_rate", "psnr_db"):
        shared.assign(request.budget, name, options.get(name), path=f"budget.{name}")
    return request


def precision_number(field: str, precision: str | None) -> int:
    """The enum's value; 0 for None."""
    return shared.choice(field, precision, _PRECISION_NUMBERS)


def list_request(model: str, target: str, precision: str, page_token: str) -> compiler_pb2.ListArtifactsRequest:
    """One page; empty strings for all."""
    request = compiler_pb2.ListArtifactsRequest(page_size=_PAGE_SIZE, page_token=page_token)
    shared.assign(request, "model", model)
    shared.assign(request, "target", shared.choice("target", target, _TARGET_NUMBERS))
    shared.assign(request, "precision", precision_number("precision", precision))
    return request


def use_request(model: str, artifact: str) -> compiler_pb2.UseArtifactRequest:
    """What the model is to be run from."""
    request = compiler_pb2.UseArtifactRequest()
    shared.assign(request, "model", model)
    shared.assign(request, "artifact", artifact)
    return request


def artifact(message: compiler_pb2.Artifact) -> types.Artifact:
    """One artifact."""
    values = shared.same_named(message, types.Artifact)
    values["target"] = _TARGETS.get(message.target)
    values["precision"] = _PRECISIONS.get(message.precision)
    values["versions"] = dict(message.versions)
    for name, kind in (("files", types.ArtifactFile), ("checks", types.Check), ("figures", types.Figure)):
        values[name] = tuple(kind(**shared.same_named(each, kind)) for each in getattr(message, name))
    return types.Artifact(**values)


def metadata(message: compiler_pb2.CompileMetadata) -> types.CompileMetadata:
    """What an operation is about."""
    return types.CompileMetadata(message.model, _TARGETS.get(message.target), _PRECISIONS.get(message.precision))


def targets(message: compiler_pb2.ListTargetsResponse) -> types.Targets:
    """What can be compiled, and to what."""
    return types.Targets(
        models=tuple(types.CompilableModel(model.name, model.kind) for model in message.models),
        targets=tuple(
            types.TargetSupport(
                _TARGETS.get(support.target),
                tuple(_PRECISIONS[number] for number in support.precisions if number in _PRECISIONS),
                support.missing,
            )
            for support in message.targets
        ),
    )


def _register() -> None:
    known: dict[Any, Any] = {compiler_pb2.Artifact: artifact, compiler_pb2.CompileMetadata: metadata}
    for message, convert in known.items():
        operation.KNOWN[message.DESCRIPTOR.full_name] = (message, convert)


_register()
