"""`inkwell models load` and `inkwell models unload`."""

import dataclasses

from inkwell import types
from inkwell.aio import AsyncClient
from inkwell.cli import report, terminal
from inkwell.cli.listing import size


async def load(client: AsyncClient, name: str, *, precision: str | None, as_json: bool, quiet: bool) -> None:
    """Load and say what serves now; raises InkwellError."""
    result: types.LoadResult | None = None
    evicted: dict[str, None] = {}
    with terminal.live(quiet=quiet) as live:
        async for event in client.load_model_stream(name, precision=precision):
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
        what = ", ".join(filter(None, (model.precision, size(model.weight_bytes), f"{result.elapsed_ms / 1000:.1f} s")))
        report.line(f"{model.name} is {model.state} on {model.hardware} ({what})")


async def unload(client: AsyncClient, name: str, *, as_json: bool) -> None:
    """Unload and say so; raises InkwellError."""
    model = await client.unload_model(name)
    if as_json:
        report.json_line(dataclasses.asdict(model))
    else:
        report.line(f"{model.name} is {model.state}")
