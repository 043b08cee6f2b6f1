"""The commands around compiled models and their options; what they do is in compiling.py."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from inkwell.channel import DEFAULT_TIMEOUT_S
from inkwell.cli.options import DEFAULT_ADDRESS, EXIT_CODES, Address, Json, Quiet, Timeout, Wait, call, connect
from inkwell.types import CompileOptions

TargetName = Literal["onnx", "openvino", "tensorrt", "triton"]
ArtifactId = Annotated[
    str, typer.Argument(help="Id from 'inkwell artifacts', or its first 8 or more digits.", metavar="ARTIFACT")
]


def compile(  # noqa: A001 - the command's name
    model: Annotated[str, typer.Argument(help="Name of a model that the compiler knows.", metavar="MODEL")],
    to: Annotated[TargetName, typer.Option("--to", help="What to compile it to.")],
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            "-p",
            help="fp32, fp16, bf16, int8, int4, or a full name such as int8_static. int8 means int8_weight_only for "
            "openvino, int8_static for tensorrt, int8_dynamic for the others.",
            metavar="NAME",
        ),
    ] = "fp32",
    component: Annotated[
        list[str] | None,
        typer.Option("--component", help="Another precision for one part; again for others.", metavar="PART=PRECISION"),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude", help="Layers that stay in float, such as 'decoder/*fc2*'; again for others.", metavar="PATTERN"
        ),
    ] = None,
    cer: Annotated[
        float | None, typer.Option("--cer", help="How much the character error rate may rise (0.01).", min=0, max=1)
    ] = None,
    psnr: Annotated[
        float | None, typer.Option("--psnr", help="How like pictures have to stay, dB (30).", min=0, max=100)
    ] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Rows or images at a time, 1 to 256 (64).")] = None,
    side: Annotated[int | None, typer.Option("--side", help="Longest side of a picture, pixels.")] = None,
    use: Annotated[bool, typer.Option("--use/--no-use", help="Let the model's service run it afterwards.")] = True,
    detach: Annotated[bool, typer.Option("--detach", help="Print the operation's name and leave it running.")] = False,
    address: Address = DEFAULT_ADDRESS,
    wait: Wait = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compile a model for another runtime, verified, and run it from there. Ctrl-C cancels it."""
    from inkwell.cli import compiling

    options: CompileOptions = {"precision": compiling.precision_named(precision, to)}
    if component:
        options["component_precisions"] = compiling.components(component, to)
    if exclude:
        options["excluded_layers"] = exclude
    if cer is not None:
        options["character_error_rate"] = cer
    if psnr is not None:
        options["psnr_db"] = psnr
    if batch is not None:
        options["max_batch_size"] = batch
    if side is not None:
        options["max_side_px"] = side
    call(
        lambda client: compiling.compile_model(
            client, model, to, options, use=use, detach=detach, as_json=json, quiet=quiet
        ),
        connect(address, wait_for_ready_s=wait),
    )


artifacts = typer.Typer(help="Compiled models: list, show, download, delete.", invoke_without_command=True)


@artifacts.callback(epilog=EXIT_CODES)
def list_artifacts(
    context: typer.Context,
    model: Annotated[str, typer.Option("--model", "-m", help="Only of this model.", metavar="NAME")] = "",
    to: Annotated[TargetName | None, typer.Option("--to", help="Only for this target.")] = None,
    precision: Annotated[str, typer.Option("--precision", "-p", help="Only of this precision.", metavar="NAME")] = "",
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    wait: Wait = None,
    json: Json = False,
) -> None:
    """List the compiled models: size, speed against torch, and whether a service runs them."""
    if context.invoked_subcommand is not None:
        return
    from inkwell.cli import compiling

    named = compiling.precision_named(precision, to or "") if precision else ""
    call(
        lambda client: compiling.listed(client, model=model, target=to or "", precision=named, as_json=json),
        connect(address, timeout_s=timeout, wait_for_ready_s=wait),
    )


@artifacts.command(epilog=EXIT_CODES)
def show(
    artifact: ArtifactId,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    wait: Wait = None,
    json: Json = False,
) -> None:
    """Show what was checked and measured of an artifact, and its files."""
    from inkwell.cli import compiling

    call(
        lambda client: compiling.show(client, artifact, as_json=json),
        connect(address, timeout_s=timeout, wait_for_ready_s=wait),
    )


@artifacts.command(epilog=EXIT_CODES)
def download(
    artifact: ArtifactId,
    folder: Annotated[Path, typer.Argument(help="Where its files go; made if it is not there.", metavar="FOLDER")],
    address: Address = DEFAULT_ADDRESS,
    wait: Wait = None,
    quiet: Quiet = False,
) -> None:
    """Download an artifact's files, each checked; called again it goes on where it broke off."""
    from inkwell.cli import compiling

    call(
        lambda client: compiling.download(client, artifact, folder, quiet=quiet),
        connect(address, timeout_s=None, wait_for_ready_s=wait),
    )


@artifacts.command(epilog=EXIT_CODES)
def delete(
    artifact: ArtifactId,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    wait: Wait = None,
) -> None:
    """Delete an artifact that no service runs."""
    from inkwell.cli import compiling

    call(
        lambda client: compiling.delete(client, artifact),
        connect(address, timeout_s=timeout, wait_for_ready_s=wait),
    )


def use(
    choice: Annotated[
        str,
        typer.Argument(
            help="A model and what to run it from: an artifact's id or its first digits, torch for the model itself, "
            "auto for what its service finds best.",
            metavar="MODEL@ARTIFACT",
        ),
    ],
    address: Address = DEFAULT_ADDRESS,
    wait: Wait = None,
    quiet: Quiet = False,
) -> None:
    """Choose what a model is run from, now and after restarts."""
    from inkwell.cli import compiling

    model, at, artifact = choice.rpartition("@")
    if not (model and at and artifact):
        raise typer.BadParameter(f"{choice!r} is not MODEL@ARTIFACT, MODEL@torch or MODEL@auto")
    call(
        lambda client: compiling.use(client, model, artifact, quiet=quiet),
        connect(address, wait_for_ready_s=wait),
    )
