"""`inkwell fleet`, `inkwell models` and `inkwell schedulers`."""

import dataclasses
from collections.abc import Iterable
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
    rows = []
    for pool in pools:
        for endpoint in pool.endpoints:
            rows.append(
                (
                    pool.name,
                    pool.service,
                    pool.hardware,
                    endpoint.address,
                    str(endpoint.state),
                    str(endpoint.in_flight_count),
                    str(endpoint.call_count),
                    str(endpoint.unavailable_count),
                    endpoint.last_error,
                )
            )
        if not pool.endpoints:
            rows.append(
                (pool.name, pool.service, pool.hardware, ", ".join(pool.targets), "no endpoint", "", "", "", "")
            )
    report.table(("POOL", "SERVICE", "HARDWARE", "ENDPOINT", "STATE", "IN FLIGHT", "CALLS", "LOST", "LAST ERROR"), rows)


async def models(client: AsyncClient, *, as_json: bool) -> None:
    """A line a model. One service's failure does not hide the other's models, but ends in its exit code."""
    found: list[tuple[Service, types.Model]] = []
    failures: list[tuple[Service, InkwellError]] = []
    for service in SERVICES:
        try:
            found += ((service, model) for model in await client.models(service))
        except InkwellError as error:
            failures.append((service, error))
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
            ("SCHEDULER", "DIFFUSERS CLASS", "WHEN TO TAKE IT"),
            [(each.name, each.diffusers_class, each.description) for each in found],
        )


def _model_row(service: Service, model: types.Model) -> tuple[str, ...]:
    match model:
        case types.OcrModel():
            beams = model.default_decoding.beam_width
            settings = f"beam width {beams}, at most {model.max_new_token_limit} tokens"
            if model.languages:
                settings += f", {' '.join(model.languages)}"
            precision, memory = str(model.precision or ""), size(model.weight_bytes)
        case types.DiffusionModel():
            settings = (
                f"{model.default_width}x{model.default_height}, {model.default_step_count} steps, "
                f"guidance {model.default_guidance_scale:g}, {model.default_scheduler}"
            )
            precision, memory = model.dtype, ""
    return (
        model.name,
        service,
        str(model.state),
        model.hardware,
        model.runtime,
        precision,
        f"{model.parameter_count:,}",
        memory,
        "yes" if model.is_default else "",
        settings,
    )


def size(count: int) -> str:
    """Bytes as MB, empty for none."""
    return f"{count / 1e6:,.1f} MB" if count else ""


def _json_lines(values: Iterable[dict[str, Any]]) -> None:
    for value in values:
        report.json_line(value)
