"""`inkwell models load` and `inkwell models unload`."""

import dataclasses

import typer

from inkwell import types
from inkwell.aio import AsyncClient
from inkwell.cli import report, terminal
from inkwell.cli.listing import bytes_of, models_by_service, precision_of, size
from inkwell.converters.inventory import Service
from inkwell.errors import NotFound, Unimplemented


async def load(
    client: AsyncClient,
    name: str,
    *,
    service: Service | None,
    precision: str | None,
    artifact: str,
    runtime: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Load and say what serves now; raises InkwellError."""
    result: types.LoadResult | None = None
    evicted: dict[str, None] = {}
    service = service or await _service_of(client, name)
    with terminal.live(quiet=quiet) as live:
        events = client.load_model_stream(
            name, service=service, precision=precision, artifact=artifact, runtime=runtime
        )
        async for event in events:
            match event:
                case types.LoadProgress():
                    evicted |= dict.fromkeys(event.evicted_models)
                    live.update(terminal.status(f"{name}: {event.stage.replace('_', ' ')}"))
                case types.LoadResult():
                    result = event
    assert result is not None
    model = result.model
    if evicted:
        report.note(f"unloaded to make room: {', '.join(evicted)}")
    if as_json:
        report.json_line(dataclasses.asdict(model) | {"elapsed_ms": result.elapsed_ms, "evicted_models": list(evicted)})
    else:
        took = f"{result.elapsed_ms / 1000:.1f} s" if result.elapsed_ms else ""
        # Torch is what a model runs on unless somebody compiled it.
        runtime = model.runtime if model.runtime != "torch" else ""
        what = ", ".join(filter(None, (runtime, precision_of(model), size(bytes_of(model)), took)))
        report.line(f"{model.name} is {model.state} on {model.hardware} ({what})")


async def unload(client: AsyncClient, name: str, *, service: Service | None, as_json: bool) -> None:
    """Unload and say so; raises InkwellError."""
    service = service or await _service_of(client, name)
    model: types.Model
    if service == "ocr":
        model = await client.unload_model(name)
    else:
        model = await client.unload_model(name, service=service)
    if as_json:
        report.json_line(dataclasses.asdict(model))
    else:
        report.line(f"{model.name} is {model.state}")


async def _service_of(client: AsyncClient, name: str) -> Service:
    """The service that lists a model of this name.

    Raises NotFound with all the names there are, BadParameter when both services have one, and what a service that
    could not be asked answered, unless the other has it.
    """
    found, failures = await models_by_service(client)
    services = [service for service, model in found if model.name == name]
    if len(services) > 1:
        raise typer.BadParameter(f"{' and '.join(services)} have a model {name!r}; say which", param_hint="--service")
    if services:
        return services[0]
    for _, failure in failures:
        if not isinstance(failure, Unimplemented):
            raise failure
    known = ", ".join(model.name for _, model in found) or "none"
    raise NotFound(f"name: there is no model {name!r}; known: {known}", reason="MODEL_NOT_FOUND", resource=name)
