"""`inkwell fleet`, `models`, `schedulers`, `adapters` and `controls`."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import typer

from inkwell import types
from inkwell.aio import AsyncClient
from inkwell.cli import report
from inkwell.converters.inventory import Service
from inkwell.errors import InkwellError, Unimplemented

SERVICES: tuple[Service, ...] = ("ocr", "diffusion")


async def fleet(client: AsyncClient, *, service: str, hardware: str, as_json: bool) -> None:
    """A line an endpoint; with JSON an object a pool."""
    pools = await client.fleet(service=service, hardware=hardware)
    if as_json:
        _json_lines(dataclasses.asdict(pool) for pool in pools)
        return
    rows: list[tuple[str, ...]] = []
    for pool in pools:
        for endpoint in pool.endpoints:
            rows.append(
                (
                    pool.name,
                    pool.service,
                    pool.hardware,
                    endpoint.address,
                    str(endpoint.state),
                    endpoint.version,
                    str(endpoint.in_flight_count),
                    str(endpoint.call_count),
                    str(endpoint.unavailable_count),
                    endpoint.last_error,
                )
            )
        if not pool.endpoints:
            rows.append((pool.name, pool.service, pool.hardware, ", ".join(pool.targets), "no endpoint", *[""] * 5))
    head = ("POOL", "SERVICE", "HARDWARE", "ENDPOINT", "STATE", "VERSION", "BUSY", "CALLS", "LOST", "LAST ERROR")
    report.table(head, rows)


async def models(client: AsyncClient, *, as_json: bool) -> None:
    """A line a model. One service's failure does not hide the other's models, but ends in its exit code."""
    found, failures = await models_by_service(client)
    # A service called directly has only its own models; that is no failure unless nobody has any.
    serious = [each for each in failures if not isinstance(each[1], Unimplemented)]
    if len(failures) == len(SERVICES):
        raise (serious or failures)[0][1]
    if as_json:
        _json_lines({"service": service} | dataclasses.asdict(model) for service, model in found)
    else:
        report.table(
            (
                "MODEL",
                "SERVICE",
                "STATE",
                "HARDWARE",
                "RUNTIME",
                "PRECISION",
                "PARAMETERS",
                "MEMORY",
                "DEFAULT",
                "SETTINGS",
            ),
            [_model_row(service, model) for service, model in found],
        )
    for service, failure in serious:
        report.explain(failure, subject=f"models of {service}")
    if serious:
        raise typer.Exit(report.exit_code(serious[0][1]))


async def schedulers(client: AsyncClient, *, as_json: bool) -> None:
    """A line a scheduler."""
    found = await client.schedulers()
    if as_json:
        _json_lines(dataclasses.asdict(each) for each in found)
    else:
        report.table(
            ("SCHEDULER", "DIFFUSERS CLASS", "ALSO CALLED", "WHEN TO TAKE IT"),
            [(each.name, each.diffusers_class, ", ".join(each.aliases), each.description) for each in found],
        )


async def adapters(client: AsyncClient, *, as_json: bool) -> None:
    """A line an adapter."""
    found = await client.adapters()
    if as_json:
        _json_lines(dataclasses.asdict(each) for each in found)
    else:
        report.table(
            ("ADAPTER", "KIND", "SIZE", "MODELS"),
            [(each.name, each.kind.replace("_", " "), size(each.file_bytes), _fits(each.models)) for each in found],
        )


async def controls(client: AsyncClient, *, as_json: bool) -> None:
    """A line a model that steers, then a line a preprocessor."""
    found = await client.controls()
    if as_json:
        _json_lines(dataclasses.asdict(each) for each in found.models)
        _json_lines({"kind": "preprocessor"} | dataclasses.asdict(each) for each in found.preprocessors)
        return
    steering = [
        (each.name, each.kind.replace("_", " "), each.preprocessor, _fits(each.models), "") for each in found.models
    ]
    steps = [(each.name, "preprocessor", "", "", each.description) for each in found.preprocessors]
    report.table(("NAME", "KIND", "WANTS PREPROCESSOR", "MODELS", "WHAT IT MAKES"), [*steering, *steps])


async def models_by_service(
    client: AsyncClient,
) -> tuple[list[tuple[Service, types.Model]], list[tuple[Service, InkwellError]]]:
    """The models of all services, and why one could not be asked."""
    found: list[tuple[Service, types.Model]] = []
    failures: list[tuple[Service, InkwellError]] = []
    for service in SERVICES:
        try:
            found += ((service, model) for model in await client.models(service))
        except InkwellError as error:
            failures.append((service, error))
    return found, failures


def _model_row(service: Service, model: types.Model) -> tuple[str, ...]:
    match model:
        case types.OcrModel():
            beams = model.default_decoding.beam_width
            settings = f"beam width {beams}, at most {model.max_new_token_limit} tokens"
            if model.languages:
                settings += f", {' '.join(model.languages)}"
        case types.DiffusionModel():
            settings = (
                f"{model.default_width}x{model.default_height}, {model.default_step_count} steps, "
                f"guidance {model.default_guidance_scale:g}, {model.default_scheduler}"
            )
            # Of a model that was never in memory only the files are known.
            settings = settings if model.default_step_count else ""
    return (
        model.name,
        service,
        str(model.state),
        model.hardware,
        model.runtime,
        precision_of(model),
        f"{model.parameter_count:,}" if model.parameter_count else "",
        size(bytes_of(model)),
        "yes" if model.is_default else "",
        settings,
    )


def precision_of(model: types.Model) -> str:
    """What its weights are computed with, empty where that is not known."""
    return str(model.precision or "") if isinstance(model, types.OcrModel) else model.precision or model.dtype


def bytes_of(model: types.Model) -> int:
    """Memory of its weights; of a model that is not loaded the size of its files; 0 where that is not known."""
    return model.weight_bytes if isinstance(model, types.OcrModel) else model.memory_bytes or model.file_bytes


def _fits(models: Sequence[str]) -> str:
    return ", ".join(models) or "not said"


def size(count: int) -> str:
    """Bytes as MB, empty for none."""
    return f"{count / 1e6:,.1f} MB" if count else ""


def _json_lines(values: Iterable[dict[str, Any]]) -> None:
    for value in values:
        report.json_line(value)
