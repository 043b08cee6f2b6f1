"""`inkwell embed`."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from inkwell import types
from inkwell.aio import AsyncClient
from inkwell.cli import report, terminal
from inkwell.cli.reading import Source
from inkwell.errors import InkwellError, InternalError

# One call embeds so many images, and so many bytes of them: within the limits that servers have unless set otherwise,
# and enough to fill their batches. Without pooling an answer is hundreds of times larger.
GROUP_IMAGES = 16
GROUP_IMAGES_WHOLE = 4
GROUP_BYTES = 24 << 20


def destination(output: str | None, *, as_json: bool) -> Path | None:
    """The file to write, None for JSON lines on stdout; checked before anything is sent. Raises BadParameter."""
    if output is None:
        return None
    option = "--output"
    path = Path(output)
    if output == "-":
        if as_json:
            raise typer.BadParameter("stdout cannot carry both the array and --json", param_hint=option)
        return path
    if path.suffix.lower() != ".npy":
        raise typer.BadParameter(f"{output!r} must end in .npy", param_hint=option)
    if path.is_dir():
        raise typer.BadParameter(f"{output!r} is a directory", param_hint=option)
    if not path.parent.is_dir():
        raise typer.BadParameter(f"there is no directory {str(path.parent)!r}", param_hint=option)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"the directory {str(path.parent)!r} cannot be written to", param_hint=option)
    return path


async def run(
    client: AsyncClient,
    images: Sequence[Source],
    options: dict[str, Any],
    where: Path | None,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Embed in groups, then print or write; raises typer.Exit for what the server refuses, or OSError."""
    parts: list[types.Embeddings] = []
    with terminal.live(quiet=quiet) as live:
        done = 0
        for group in _groups(images, GROUP_IMAGES_WHOLE if options["pooling"] == "none" else GROUP_IMAGES):
            live.update(terminal.bar(done, len(images), "images"))
            done += len(group)
            try:
                part = await client.embed([source for _, source in group], **options)
            except InkwellError as error:
                _tell(error, group, as_json=as_json or where is None)
                raise typer.Exit(report.exit_code(error)) from None
            if where is None:
                for (name, _), row in zip(group, part.tolist(), strict=True):
                    report.json_line({"file": name, "model": part.model, "dtype": part.dtype, "embedding": row})
            else:
                parts.append(part)
    if where is None:
        return
    whole = _joined(parts)
    if str(where) == "-":
        report.raw(whole.npy())
        return
    try:
        whole.save(where)
    except OSError as error:
        raise OSError(f"cannot write {where}: {error.strerror or error}") from error
    if as_json:
        report.json_line({"file": str(where), "model": whole.model, "dtype": whole.dtype, "shape": whole.shape})
    else:
        report.line(str(where))


def _tell(error: InkwellError, group: Sequence[Source], *, as_json: bool) -> None:
    """Explain it by the names of the images that it is about, if it is about some."""
    numbers = {int(match[1]) for each in error.fields if (match := re.match(r"images\[(\d+)\]", each.field))}
    names = [group[number][0] for number in sorted(numbers) if number < len(group)]
    if as_json:
        report.json_line({"file": ", ".join(names) or None, "error": report.error_as_json(error)})
    report.explain(error, subject=", ".join(names))


def _groups(images: Sequence[Source], most: int) -> Iterator[list[Source]]:
    group: list[Source] = []
    weight = 0
    for name, source in images:
        size = len(source) if isinstance(source, bytes) else os.path.getsize(name)
        if group and (len(group) == most or weight + size > GROUP_BYTES):
            yield group
            group, weight = [], 0
        group.append((name, source))
        weight += size
    yield group


def _joined(parts: Sequence[types.Embeddings]) -> types.Embeddings:
    first = parts[0]
    if any((each.dtype, each.shape[1:], each.model) != (first.dtype, first.shape[1:], first.model) for each in parts):
        raise InternalError("the server's model changed between two calls", reason="MODEL_CHANGED")
    return types.Embeddings(
        content=b"".join(each.content for each in parts),
        dtype=first.dtype,
        shape=(sum(each.shape[0] for each in parts), *first.shape[1:]),
        model=first.model,
        timing=first.timing,
        served_by=first.served_by,
    )
