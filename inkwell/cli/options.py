"""Options that several commands have, and how a command calls the server."""

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from inkwell.aio import AsyncClient
from inkwell.credentials import tls
from inkwell.types import EarlyStopping

EXIT_CODES = (
    "Exit codes: 0 done; 1 some of several images failed, or a defect of the server; 2 wrong usage, or a request that "
    "can never work; 3 no such model, scheduler, …; 4 the server is unreachable or not ready; 5 the server is "
    "overloaded; 6 it took longer than --timeout; 7 the server cannot or will not do this (hardware, missing call, "
    "access); 130 interrupted by Ctrl-C; 141 the reader of stdout went away."
)

DEFAULT_ADDRESS = "localhost:50050"
LIST_TIMEOUT_S = 10.0
LONG_TIMEOUT_S = 3600.0
"""For documents of many pages, and models that have to be read from disk."""

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
Language = Annotated[
    list[str] | None,
    typer.Option(
        "--language", "-l", help="Language of the text, such as fr; again for others. Chooses the model.", metavar="TAG"
    ),
]
BeamWidth = Annotated[
    int | None, typer.Option("--beam-width", help="Rows searched at once, 1 (greedy) to 16.", metavar="N")
]
LengthPenalty = Annotated[
    float | None, typer.Option("--length-penalty", help="Above 0 favours longer text; beam search only.")
]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", help="Tokens to decode at most, for each line.", metavar="N")
]
NoRepeat = Annotated[
    int | None, typer.Option("--no-repeat", help="No run of N tokens may come twice; 0 allows all.", metavar="N")
]
Stopping = Annotated[
    EarlyStopping | None,
    typer.Option("--early-stopping", help="When a beam search ends that has enough texts."),
]


@dataclass(frozen=True)
class Proof:
    """What the options before the command say of who calls."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    token: str | None = None


given_proof: ContextVar[Proof] = ContextVar("inkwell_proof")


def connect(address: str, **options: Any) -> AsyncClient:
    """A client with the credentials that the options before the command give it."""
    proof = given_proof.get(Proof())
    encrypted = proof.ca or proof.certificate or proof.key
    try:
        credentials = tls(ca=proof.ca, certificate=proof.certificate, key=proof.key) if encrypted else None
    except OSError as error:
        raise typer.BadParameter(f"{error.filename}: {error.strerror}") from None
    return AsyncClient(address, credentials=credentials, token=proof.token, **options)


def call(work: Callable[[AsyncClient], Awaitable[None]], client: AsyncClient) -> None:
    """Do the work and close the client.

    On an event loop because Ctrl-C then cancels the work, at the server too, wherever it happens to be; in a program
    of threads it may strike inside gRPC's own locks.
    """

    async def session() -> None:
        async with client:
            await work(client)

    asyncio.run(session())
