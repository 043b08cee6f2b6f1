"""The commands and their options; what they do is in the modules beside this one."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

import typer

from inkwell.aio import AsyncClient
from inkwell.channel import DEFAULT_TIMEOUT_S
from inkwell.version import __version__

EXIT_CODES = (
    "Exit codes: 0 done; 1 some of several images failed, or a defect of the server; 2 wrong usage, or a request that "
    "can never work; 3 no such model, scheduler, …; 4 the server is unreachable or not ready; 5 the server is "
    "overloaded; 6 it took longer than --timeout; 7 the server cannot or will not do this (hardware, missing call, "
    "access); 130 interrupted by Ctrl-C; 141 the reader of stdout went away."
)

app = typer.Typer(
    help="Read handwriting and paint pictures through Inkwell.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Address = Annotated[
    str,
    typer.Option("--address", "-a", envvar="INKWELL_ADDRESS", help="Gateway or service to call.", metavar="HOST:PORT"),
]
Hardware = Annotated[
    str | None,
    typer.Option(
        "--hardware", help="Ordered preference, such as 'cuda, cpu'; 'cuda!' for only that.", metavar="LABELS"
    ),
]
Timeout = Annotated[float, typer.Option("--timeout", help="Seconds a call may take.", min=0.001)]
Wait = Annotated[
    float | None, typer.Option("--wait", help="Seconds to wait for a connection, instead of failing at once.", min=0)
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
ModelName = Annotated[str, typer.Option("--model", "-m", help="Name from 'inkwell models'.", metavar="NAME")]

DEFAULT_ADDRESS = "localhost:50050"
LIST_TIMEOUT_S = 10.0


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"inkwell {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(epilog=EXIT_CODES)
def read(
    images: Annotated[
        list[str], typer.Argument(help="Picture files of one line each; '-' for stdin.", metavar="IMAGE")
    ],
    address: Address = DEFAULT_ADDRESS,
    model: ModelName = "",
    beam_width: Annotated[
        int | None, typer.Option("--beam-width", help="Rows searched at once, 1 (greedy) to 16.", metavar="N")
    ] = None,
    alternatives: Annotated[
        int | None,
        typer.Option(
            "--alternatives",
            help="Show the N best readings with their confidence; the beam is then 4 or N wide, unless you set it.",
            min=1,
            metavar="N",
        ),
    ] = None,
    length_penalty: Annotated[
        float | None, typer.Option("--length-penalty", help="Above 0 favours longer text; beam search only.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Tokens to decode at most.", metavar="N")
    ] = None,
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
        "beam_width": beam_width,
        "hypothesis_count": alternatives,
        "length_penalty": length_penalty,
        "max_new_token_count": max_tokens,
        "timeout_s": timeout,
    }
    sources = reading.sources(images)
    _call(
        lambda client: reading.run(client, sources, options, alternatives=alternatives, as_json=json, quiet=quiet),
        AsyncClient(address, hardware=hardware, wait_for_ready_s=wait),
    )


@app.command(epilog=EXIT_CODES)
def paint(
    prompt: Annotated[str | None, typer.Argument(help="What to paint; optional with --like.", metavar="PROMPT")] = None,
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", help="File to write: .png, .jpg or .webp; '-' for a PNG on stdout.", metavar="FILE"
        ),
    ] = ...,  # type: ignore[assignment]  # typer's mark of a required option
    address: Address = DEFAULT_ADDRESS,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Name from 'inkwell models'.", metavar="NAME")
    ] = None,
    negative: Annotated[str | None, typer.Option("--negative", "-n", help="What it should not show.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Denoising steps.")] = None,
    size: Annotated[str | None, typer.Option("--size", help="In pixels, such as 64x64.", metavar="WxH")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="How strongly the prompt rules.")] = None,
    scheduler: Annotated[
        str | None, typer.Option("--scheduler", help="Name from 'inkwell schedulers'.", metavar="NAME")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="0 to 4294967295; random if left out.")] = None,
    count: Annotated[
        int, typer.Option("--count", "-c", help="Pictures to paint; several get -1, -2, … before the extension.", min=1)
    ] = 1,
    quality: Annotated[int | None, typer.Option("--quality", help="1 to 100, for JPEG and WebP.")] = None,
    like: Annotated[
        Path | None,
        typer.Option("--like", help="Repeat this picture from the parameters in its file; other options override."),
    ] = None,
    preview: Annotated[
        bool, typer.Option("--preview/--no-preview", help="Draw previews where the terminal has colours.")
    ] = True,
    hardware: Hardware = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    wait: Wait = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Paint a picture from a prompt; prints the path of every picture written."""
    from inkwell.cli import painting

    if prompt is None and like is None:
        raise typer.BadParameter("say what to paint, or give --like FILE", param_hint="PROMPT")
    destination = painting.destination(output, count)
    if json and destination.stdout:
        raise typer.BadParameter("stdout cannot carry both the picture and --json", param_hint="--output")
    width, height = _size(size)
    options = painting.merged(
        like,
        {
            "prompt": prompt,
            "negative_prompt": negative,
            "model": model,
            "width": width,
            "height": height,
            "steps": steps,
            "guidance_scale": guidance,
            "scheduler": scheduler,
            "seed": seed,
        },
    )
    options |= {"media_type": destination.media_type, "quality": quality, "timeout_s": timeout}
    if count > 1:
        options["image_count"] = count
    _call(
        lambda client: painting.run(client, options, destination, as_json=json, quiet=quiet, preview=preview),
        AsyncClient(address, hardware=hardware, wait_for_ready_s=wait),
    )


@app.command(epilog=EXIT_CODES)
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

    _call(
        lambda client: listing.fleet(client, service=service, hardware=hardware, as_json=json),
        AsyncClient(address, timeout_s=timeout, wait_for_ready_s=wait),
    )


@app.command(epilog=EXIT_CODES)
def models(
    address: Address = DEFAULT_ADDRESS,
    hardware: Hardware = None,
    timeout: Timeout = LIST_TIMEOUT_S,
    wait: Wait = None,
    json: Json = False,
) -> None:
    """List the models that can read or paint."""
    from inkwell.cli import listing

    _call(
        lambda client: listing.models(client, as_json=json),
        AsyncClient(address, hardware=hardware, timeout_s=timeout, wait_for_ready_s=wait),
    )


@app.command(epilog=EXIT_CODES)
def schedulers(
    address: Address = DEFAULT_ADDRESS,
    hardware: Hardware = None,
    timeout: Timeout = LIST_TIMEOUT_S,
    wait: Wait = None,
    json: Json = False,
) -> None:
    """List the schedulers that 'inkwell paint' knows by name."""
    from inkwell.cli import listing

    _call(
        lambda client: listing.schedulers(client, as_json=json),
        AsyncClient(address, hardware=hardware, timeout_s=timeout, wait_for_ready_s=wait),
    )


def _call(work: Callable[[AsyncClient], Awaitable[None]], client: AsyncClient) -> None:
    """Do the work and close the client.

    On an event loop because Ctrl-C then cancels the work, at the server too, wherever it happens to be; in a program
    of threads it may strike inside gRPC's own locks.
    """

    async def session() -> None:
        async with client:
            await work(client)

    asyncio.run(session())


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    match = re.fullmatch(r"(\d{1,9})[xX×](\d{1,9})", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not WIDTHxHEIGHT in pixels, such as 64x64", param_hint="--size")
    return int(match[1]), int(match[2])
