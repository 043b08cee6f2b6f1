"""The commands and their options; what they do is in the modules beside this one."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from inkwell.channel import DEFAULT_TIMEOUT_S
from inkwell.cli import artifacts, gateway, inventory
from inkwell.cli import paint as painter
from inkwell.cli.options import (
    DEFAULT_ADDRESS,
    EXIT_CODES,
    LONG_TIMEOUT_S,
    Address,
    BeamWidth,
    Hardware,
    Json,
    Language,
    LengthPenalty,
    MaxTokens,
    ModelName,
    NoRepeat,
    Proof,
    Quiet,
    Stopping,
    Timeout,
    Wait,
    call,
    connect,
    given_proof,
)
from inkwell.types import ExportFormat
from inkwell.version import __version__

app = typer.Typer(
    help="Read handwriting and paint pictures through Inkwell.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"inkwell {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    ca: Annotated[
        Path | None,
        typer.Option("--ca", envvar="INKWELL_CA", help="Who signed the server's certificate, in PEM.", metavar="FILE"),
    ] = None,
    certificate: Annotated[
        Path | None,
        typer.Option("--cert", envvar="INKWELL_CERT", help="Certificate of the caller, in PEM.", metavar="FILE"),
    ] = None,
    key: Annotated[
        Path | None, typer.Option("--key", envvar="INKWELL_KEY", help="Its private key, in PEM.", metavar="FILE")
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            "--token",
            envvar="INKWELL_TOKEN",
            help="JWT or API key of the caller. Rather in the environment: others may see a command line.",
            show_envvar=True,
            metavar="TOKEN",
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    given_proof.set(Proof(ca=ca, certificate=certificate, key=key, token=token))


@app.command(epilog=EXIT_CODES)
def read(
    images: Annotated[
        list[str], typer.Argument(help="Picture files of one line each; '-' for stdin.", metavar="IMAGE")
    ],
    address: Address = DEFAULT_ADDRESS,
    model: ModelName = "",
    language: Language = None,
    beam_width: BeamWidth = None,
    alternatives: Annotated[
        int | None,
        typer.Option(
            "--alternatives",
            help="Show the N best readings with their confidence; the beam is then 4 or N wide, unless you set it.",
            min=1,
            metavar="N",
        ),
    ] = None,
    length_penalty: LengthPenalty = None,
    max_tokens: MaxTokens = None,
    no_repeat: NoRepeat = None,
    early_stopping: Stopping = None,
    hardware: Hardware = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    wait: Wait = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read handwriting: one line of text an image.

    One image prints its text; several print FILE, a tab and the text, in the order given.
    """
    from inkwell.cli import reading

    if alternatives is not None and beam_width is None:
        beam_width = max(4, alternatives) if alternatives > 1 else None
    options: reading.Options = {
        "model": model,
        "languages": language or (),
        "beam_width": beam_width,
        "hypothesis_count": alternatives,
        "length_penalty": length_penalty,
        "max_new_token_count": max_tokens,
        "no_repeat_ngram_size": no_repeat,
        "early_stopping": early_stopping,
        "timeout_s": timeout,
    }
    sources = reading.sources(images)
    call(
        lambda client: reading.run(client, sources, options, alternatives=alternatives, as_json=json, quiet=quiet),
        connect(address, hardware=hardware, wait_for_ready_s=wait),
    )


@app.command(epilog=EXIT_CODES)
def document(
    file: Annotated[
        str, typer.Argument(help="A PDF, a TIFF of several pages, or a photo; '-' for stdin.", metavar="FILE")
    ],
    address: Address = DEFAULT_ADDRESS,
    pages: Annotated[
        str | None, typer.Option("--pages", help="Pages to read, such as 1-3,7,9-; all if left out.", metavar="PAGES")
    ] = None,
    formats: Annotated[
        list[ExportFormat] | None,
        typer.Option(
            "--format",
            "-f",
            help="What to write; again for several. Text if left out, or what the end of --output says.",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="File, or folder for files named after FILE; else stdout.", metavar="PATH"),
    ] = None,
    dpi: Annotated[
        int | None, typer.Option("--dpi", help="Dots per inch to render PDF pages at, 72 to 600; 200 if left out.")
    ] = None,
    orientation: Annotated[
        Literal["auto", "0", "90", "180", "270"],
        typer.Option(
            "--orientation",
            help="Degrees clockwise that pages must be turned to be upright; auto finds out page by page.",
        ),
    ] = "auto",
    min_confidence: Annotated[
        float | None, typer.Option("--min-confidence", help="Leave out lines of less, 0 to 1.")
    ] = None,
    model: ModelName = "",
    language: Language = None,
    beam_width: BeamWidth = None,
    length_penalty: LengthPenalty = None,
    max_tokens: MaxTokens = None,
    no_repeat: NoRepeat = None,
    early_stopping: Stopping = None,
    hardware: Hardware = None,
    timeout: Timeout = LONG_TIMEOUT_S,
    wait: Wait = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read a document: finds the lines of its pages and reads them in order.

    Prints the text, page by page as it is read, or writes files and prints their paths.
    """
    from inkwell.cli import documents, reading

    where = documents.destination(file, formats or [], output, as_json=json)
    (source,) = reading.sources([file], "FILE")
    options = {
        "pages": pages,
        "dpi": dpi,
        "orientation": None if orientation == "auto" else int(orientation),
        "min_confidence": min_confidence,
        "model": model,
        "languages": language or (),
        "beam_width": beam_width,
        "length_penalty": length_penalty,
        "max_new_token_count": max_tokens,
        "no_repeat_ngram_size": no_repeat,
        "early_stopping": early_stopping,
        "timeout_s": timeout,
    }
    call(
        lambda client: documents.run(client, source, options, where, as_json=json, quiet=quiet),
        connect(address, hardware=hardware, wait_for_ready_s=wait),
    )


@app.command(epilog=EXIT_CODES)
def embed(
    images: Annotated[
        list[str], typer.Argument(help="Picture files of one line each; '-' for stdin.", metavar="IMAGE")
    ],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help=".npy file for all of them; '-' for stdout. Else JSON.", metavar="FILE"),
    ] = None,
    address: Address = DEFAULT_ADDRESS,
    model: ModelName = "",
    pooling: Annotated[
        Literal["mean", "cls", "none"],
        typer.Option(
            "--pooling", help="One vector an image, the mean or the first (cls) of its tokens', or (none) all of them."
        ),
    ] = "mean",
    dtype: Annotated[Literal["float32", "float16"], typer.Option("--dtype", help="Type of the numbers.")] = "float32",
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale each vector to length 1 (L2).")] = False,
    hardware: Hardware = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    wait: Wait = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn images of handwriting into vectors: a JSON object a line, or a .npy file with a row an image."""
    from inkwell.cli import embedding, reading

    where = embedding.destination(output, as_json=json)
    sources = reading.sources(images)
    options = {"model": model, "pooling": pooling, "dtype": dtype, "normalize": normalize, "timeout_s": timeout}
    call(
        lambda client: embedding.run(client, sources, options, where, as_json=json, quiet=quiet),
        connect(address, hardware=hardware, wait_for_ready_s=wait),
    )


app.command(epilog=EXIT_CODES)(painter.paint)
app.command(epilog=EXIT_CODES)(inventory.fleet)
app.add_typer(gateway.gateway, name="gateway")
app.add_typer(inventory.models, name="models")
app.command(epilog=EXIT_CODES)(inventory.schedulers)
app.command(epilog=EXIT_CODES)(inventory.adapters)
app.command(epilog=EXIT_CODES)(inventory.controls)
app.command(epilog=EXIT_CODES)(artifacts.compile)
app.add_typer(artifacts.artifacts, name="artifacts")
app.command(epilog=EXIT_CODES)(artifacts.use)
