"""The commands `inkwell fleet`, `models`, `schedulers`, `adapters` and `controls`."""

from typing import Annotated, Literal

import typer

from inkwell.cli.options import (
    DEFAULT_ADDRESS,
    EXIT_CODES,
    LIST_TIMEOUT_S,
    LONG_TIMEOUT_S,
    Address,
    Hardware,
    Json,
    Quiet,
    Timeout,
    Wait,
    call,
    connect,
)
from inkwell.types import Precision

models = typer.Typer(
    help="List the models that can read or paint, or load and unload one.",
    epilog=EXIT_CODES,
    invoke_without_command=True,
    subcommand_metavar="[COMMAND]",
)

Name = Annotated[str, typer.Argument(help="Name from 'inkwell models'.", metavar="NAME")]
ItsService = Annotated[
    Literal["ocr", "diffusion"] | None,
    typer.Option("--service", help="The service that has it; the one that lists it if left out."),
]


def fleet(
    address: Address = DEFAULT_ADDRESS,
    service: Annotated[str, typer.Option("--service", help="Only pools of this service: ocr or diffusion.")] = "",
    hardware: Annotated[str, typer.Option("--hardware", help="Only pools with this label.")] = "",
    timeout: Timeout = LIST_TIMEOUT_S,
    wait: Wait = None,
    json: Json = False,
) -> None:
    """Show the pools behind a gateway: endpoints, their state and load."""
    from inkwell.cli import listing

    call(
        lambda client: listing.fleet(client, service=service, hardware=hardware, as_json=json),
        connect(address, timeout_s=timeout, wait_for_ready_s=wait),
    )


def schedulers(
    address: Address = DEFAULT_ADDRESS,
    hardware: Hardware = None,
    timeout: Timeout = LIST_TIMEOUT_S,
    wait: Wait = None,
    json: Json = False,
) -> None:
    """List the schedulers that 'inkwell paint' knows by name."""
    from inkwell.cli import listing

    call(
        lambda client: listing.schedulers(client, as_json=json),
        connect(address, hardware=hardware, timeout_s=timeout, wait_for_ready_s=wait),
    )


def adapters(
    address: Address = DEFAULT_ADDRESS,
    hardware: Hardware = None,
    timeout: Timeout = LIST_TIMEOUT_S,
    wait: Wait = None,
    json: Json = False,
) -> None:
    """List the LoRAs, embeddings and image prompt adapters that 'inkwell paint' knows by name."""
    from inkwell.cli import listing

    call(
        lambda client: listing.adapters(client, as_json=json),
        connect(address, hardware=hardware, timeout_s=timeout, wait_for_ready_s=wait),
    )


def controls(
    address: Address = DEFAULT_ADDRESS,
    hardware: Hardware = None,
    timeout: Timeout = LIST_TIMEOUT_S,
    wait: Wait = None,
    json: Json = False,
) -> None:
    """List what steers a composition with 'inkwell paint --control': models, and preprocessors of their pictures."""
    from inkwell.cli import listing

    call(
        lambda client: listing.controls(client, as_json=json),
        connect(address, hardware=hardware, timeout_s=timeout, wait_for_ready_s=wait),
    )


@models.callback()
def _list_models(
    context: typer.Context,
    address: Address = DEFAULT_ADDRESS,
    hardware: Hardware = None,
    timeout: Timeout = LIST_TIMEOUT_S,
    wait: Wait = None,
    json: Json = False,
) -> None:
    if context.invoked_subcommand is not None:
        for name in context.params:
            source = context.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":  # it would be ignored
                raise typer.BadParameter(f"give it after '{context.invoked_subcommand}'", param_hint=f"--{name}")
        return
    from inkwell.cli import listing

    call(
        lambda client: listing.models(client, as_json=json),
        connect(address, hardware=hardware, timeout_s=timeout, wait_for_ready_s=wait),
    )


@models.command(epilog=EXIT_CODES)
def load(
    name: Name,
    address: Address = DEFAULT_ADDRESS,
    service: ItsService = None,
    precision: Annotated[
        Precision | None,
        typer.Option(
            "--precision",
            "-p",
            help="What the weights of a model that reads are computed with; else the server's setting.",
        ),
    ] = None,
    artifact: Annotated[
        str, typer.Option("--artifact", "-a", help="Run from this compiled model: its id, or the first digits.")
    ] = "",
    runtime: Annotated[
        str,
        typer.Option(
            "--runtime",
            "-r",
            help="torch, onnxruntime, openvino, tensorrt or triton; else the server's setting.",
        ),
    ] = "",
    hardware: Hardware = None,
    timeout: Timeout = LONG_TIMEOUT_S,
    wait: Wait = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Load a model, and wait until it serves; through a gateway, at the one endpoint that it chooses."""
    from inkwell.cli import loading

    call(
        lambda client: loading.load(
            client,
            name,
            service=service,
            precision=precision,
            artifact=artifact,
            runtime=runtime,
            as_json=json,
            quiet=quiet,
        ),
        connect(address, hardware=hardware, timeout_s=timeout, wait_for_ready_s=wait),
    )


@models.command(epilog=EXIT_CODES)
def unload(
    name: Name,
    address: Address = DEFAULT_ADDRESS,
    service: ItsService = None,
    hardware: Hardware = None,
    timeout: Timeout = LONG_TIMEOUT_S,
    wait: Wait = None,
    json: Json = False,
) -> None:
    """Free a model's memory once the calls that use it are done; the next call that names it loads it again."""
    from inkwell.cli import loading

    call(
        lambda client: loading.unload(client, name, service=service, as_json=json),
        connect(address, hardware=hardware, timeout_s=timeout, wait_for_ready_s=wait),
    )
