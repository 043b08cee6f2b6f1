"""What `inkwell compile`, `artifacts` and `use` do."""

import asyncio
import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import typer

from inkwell import types
from inkwell.aio import AsyncClient
from inkwell.aio_operation import AsyncOperation
from inkwell.cli import report, terminal
from inkwell.cli.listing import size
from inkwell.converters.inventory import Service
from inkwell.errors import Cancelled, InkwellError, NotFound

# Names of figures that the compiler writes, for the list.
_SPEED = "speed against torch float32"
_BYTES = "weight bytes against float32"
_SERVICES: dict[str, Service] = {"trocr": "ocr", "diffusion": "diffusion"}
# What people write: plain int8 is what each target computes fastest and most exactly.
_SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int4": "int4_weight_only"}
_INT8 = {"onnx": "int8_dynamic", "triton": "int8_dynamic", "openvino": "int8_weight_only", "tensorrt": "int8_static"}


def precision_named(name: str, target: str) -> str:
    """A precision as people write it: fp32, bf16, int8 … or as the protocol calls it."""
    return _INT8.get(target, "int8_dynamic") if name == "int8" else _SHORT.get(name, name)


def components(pairs: list[str], target: str) -> dict[str, str]:
    """ "vae_decoder=fp32" → {"vae_decoder": "float32"}; raises BadParameter for anything else."""
    found = {}
    for pair in pairs:
        name, equals, precision = pair.partition("=")
        if not (name and equals and precision):
            raise typer.BadParameter(f"{pair!r} is not COMPONENT=PRECISION", param_hint="--component")
        found[name] = precision_named(precision, target)
    return found


async def compile_model(
    client: AsyncClient,
    model: str,
    target: str,
    options: types.CompileOptions,
    *,
    use: bool,
    detach: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compile, follow it to its end and let the model's service run it; raises InkwellError."""
    operation = await client.compile(model, target, **options)
    if detach:
        if as_json:
            report.json_line({"operation": operation.name})
        else:
            report.line(operation.name)
        return
    try:
        artifact = await _followed(operation, f"{model} to {target}", quiet=quiet)
    except asyncio.CancelledError:
        # Ctrl-C means the compile and not only its looking on; the server has to hear of it before this ends.
        with contextlib.suppress(InkwellError):
            await asyncio.shield(operation.cancel(timeout_s=5.0))
        raise
    loaded = await _load(client, artifact, quiet=quiet) if use else None
    if as_json:
        report.json_line(_plain(artifact) | {"used": use})
        return
    report.line(f"{artifact.id}")
    report.note(_summary(artifact))
    if loaded is not None:
        report.note(f"{loaded.name} runs on {loaded.runtime} now; `inkwell use {model}@torch` takes it back")
    elif use:
        report.note(f"{model} will run from it when it is next loaded; `inkwell use {model}@torch` takes it back")


async def _followed(operation: AsyncOperation[types.Artifact], what: str, *, quiet: bool) -> types.Artifact:
    with terminal.live(quiet=quiet) as live:
        live.update(terminal.status(f"{what}: asked for"))
        async for event in operation.events():
            match event:
                case types.Queued():
                    live.update(terminal.status(f"{what}: {event.position} before it"))
                case types.OperationProgress():
                    note = f"{event.stage}: {event.note}"
                    live.update(terminal.bar(event.step, event.step_count, "stages", note))
                case types.OperationDone(error=Cancelled() as error):
                    raise error
    return await operation.result()


async def show(client: AsyncClient, artifact_id: str, *, as_json: bool) -> None:
    """Everything about one artifact; raises InkwellError."""
    artifact = await client.artifact(artifact_id)
    if as_json:
        report.json_line(_plain(artifact))
        return
    report.line(f"artifact   {artifact.id}")
    report.line(f"model      {artifact.model} ({artifact.source})")
    report.line(f"target     {artifact.target}, {artifact.precision}, {size(artifact.size_bytes)}")
    versions = ", ".join(f"{name} {version}" for name, version in sorted(artifact.versions.items()))
    report.line(f"made       {artifact.created_at} on {artifact.hardware}: {versions}")
    report.line(f"in use     {'yes' if artifact.in_use else 'no'}")
    report.table(
        ("CHECK", "VALUE", "LIMIT"),
        [
            (check.name, _number(check.value, check.unit), f"{'>=' if check.at_least else '<='} {check.limit:g}")
            for check in artifact.checks
        ],
    )
    report.table(
        ("FIGURE", "VALUE"), [(figure.name, _number(figure.value, figure.unit)) for figure in artifact.figures]
    )
    report.table(("FILE", "SIZE"), [(file.path, size(file.size_bytes)) for file in artifact.files])


async def listed(client: AsyncClient, *, model: str, target: str, precision: str, as_json: bool) -> None:
    """A line an artifact; raises InkwellError."""
    artifacts = await client.artifacts(model=model, target=target, precision=precision)
    if as_json:
        for artifact in artifacts:
            report.json_line(_plain(artifact))
        return
    report.table(
        ("ARTIFACT", "MODEL", "TARGET", "PRECISION", "SIZE", "BYTES", "SPEED", "IN USE", "MADE"),
        [
            (
                artifact.id[:12],
                artifact.model,
                str(artifact.target or "?"),
                str(artifact.precision or "?"),
                size(artifact.size_bytes),
                _ratio(artifact, _BYTES),
                _ratio(artifact, _SPEED),
                "yes" if artifact.in_use else "",
                artifact.created_at,
            )
            for artifact in artifacts
        ],
    )


async def download(client: AsyncClient, artifact_id: str, folder: Path, *, quiet: bool) -> None:
    """Write an artifact's files; raises InkwellError, OSError."""
    with terminal.live(quiet=quiet) as live:

        def on_progress(progress: types.DownloadProgress) -> None:
            path, done, total = progress
            live.update(terminal.bar(done >> 10, total >> 10, "KiB", path))

        artifact = await client.download_artifact(artifact_id, folder, on_progress=on_progress)
    report.line(str(folder))
    report.note(f"{len(artifact.files) + 1} files, {size(artifact.size_bytes)}")


async def delete(client: AsyncClient, artifact_id: str) -> None:
    """Remove it and say so; raises InkwellError."""
    freed = await client.delete_artifact(artifact_id)
    report.line(f"deleted {artifact_id}; {size(freed)} free")


async def use(client: AsyncClient, model: str, artifact_id: str, *, quiet: bool) -> None:
    """Choose what a model is run from, now and after restarts; raises InkwellError."""
    artifact = await client.use_artifact(model, artifact_id)
    if artifact is not None:
        loaded = await _load(client, artifact, quiet=quiet, chosen=True)
        what = f"runs on {loaded.runtime}, " if loaded is not None else "will run, when it is next loaded, from "
        report.line(f"{model} {what}artifact {artifact.id[:12]}")
        return
    kinds = {known.name: known.kind for known in (await client.targets()).models}
    service = _SERVICES.get(kinds.get(model, ""), "ocr")
    runtime = "torch" if artifact_id == "torch" else ""
    with terminal.live(quiet=quiet) as live:
        live.update(terminal.status(f"{model}: loading"))
        try:
            back = await client.load_model(model, service=service, runtime=runtime, timeout_s=None)
        except NotFound:
            # No model of its own, such as a ControlNet: it is read anew when a call next names it.
            report.line(f"{model}: chosen; it holds from the next time that it is loaded")
            return
    report.line(f"{back.name} runs on {back.runtime}")


async def _load(
    client: AsyncClient, artifact: types.Artifact, *, quiet: bool, chosen: bool = False
) -> types.Model | None:
    """None for what is no model of its own, such as a ControlNet: it is read when a call first names it."""
    if not chosen:
        await client.use_artifact(artifact.model, artifact.id)
    service = _SERVICES[artifact.kind]
    with terminal.live(quiet=quiet) as live:
        live.update(terminal.status(f"{artifact.model}: loading artifact {artifact.id[:12]}"))
        try:
            return await client.load_model(artifact.model, service=service, artifact=artifact.id, timeout_s=None)
        except NotFound:
            return None


def _plain(artifact: types.Artifact) -> dict[str, Any]:
    plain = dataclasses.asdict(artifact)
    del plain["manifest_json"]  # the same again
    return plain


def _summary(artifact: types.Artifact) -> str:
    parts = [f"{artifact.model} for {artifact.target}, {artifact.precision}: {size(artifact.size_bytes)}"]
    if (smaller := artifact.figure(_BYTES)) is not None:
        parts.append(f"{smaller:.2f} of the float32 bytes")
    if (faster := artifact.figure(_SPEED)) is not None:
        parts.append(f"{faster:.1f} times as fast as torch")
    return ", ".join(parts) + f"; {len(artifact.checks)} checks passed"


def _ratio(artifact: types.Artifact, name: str) -> str:
    value = artifact.figure(name)
    return "" if value is None else f"{value:.2f}x"


def _number(value: float, unit: str) -> str:
    return f"{value:.4g} {unit}".rstrip()
