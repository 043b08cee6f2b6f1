"""`inkwell gateway check`: hands a gateway's configuration to the gateway, where that is installed."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

gateway = typer.Typer(help="For those who run a gateway.", no_args_is_help=True)

_MODULE = "services.gateway"


@gateway.callback()
def _root() -> None:
    pass


@gateway.command()
def check(
    file: Annotated[Path, typer.Argument(help="The configuration, such as gateway.yaml.", metavar="FILE")],
) -> None:
    """Say whether a gateway's configuration is right, and what it does. Ends with 2 if it is wrong."""
    if not _installed():
        typer.echo("the gateway is not installed here; run this where it is, such as in its image", err=True)
        raise typer.Exit(2)
    # In a process of its own: the SDK imports nothing of the services.
    raise typer.Exit(subprocess.run([sys.executable, "-m", _MODULE, "check", str(file)], check=False).returncode)


def _installed() -> bool:
    try:
        return importlib.util.find_spec(_MODULE) is not None
    except ModuleNotFoundError:
        return False
