"""Artifacts of a few bytes, made as the compiler makes them."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from services.runtimes.artifacts.manifest import (
    FORMAT,
    SPEED_RATIO,
    Axis,
    BuiltOn,
    Check,
    Graph,
    Manifest,
    Measured,
    Port,
    Requires,
)
from services.runtimes.artifacts.store import Store, Stored

FILES: Mapping[str, bytes] = {
    "encoder.onnx": b"graph of the encoder",
    "encoder.onnx.data": bytes(range(256)) * 40,
    "model/config.json": b"{}",
    "model/tokenizer/vocab.json": b'{"a": 0}',
}


def manifest(number: int = 0, *, speed: float | None = None, **changes: Any) -> Manifest:
    """A manifest of its own recipe for each number, the higher the newer; speed: times that of torch."""
    made = Manifest(
        format=FORMAT,
        kind="trocr",
        model="handwriting-tiny",
        source="models/handwriting-tiny",
        source_digest="5" * 64,
        recipe=f"recipe {number}",
        target="onnx",
        precision="float32",
        graphs=(
            Graph(
                "encoder",
                "encoder.onnx",
                (Port("pixel_values", "float32", ("batch", 3, 32, 32)),),
                (Port("states", "float32", ("batch", 17, 8)),),
                (Axis("batch", 1, 8),),
                10_240,
            ),
        ),
        model_folder="model",
        files=(),
        built_on=BuiltOn("cpu", "some CPU", (), {"onnx": "1.23.2"}),
        requires=Requires(),
        checks=(Check("encoder: largest error", 0.001, 0.01, at_least=False),),
        measured=() if speed is None else (Measured(SPEED_RATIO, speed),),
        created_at=f"2026-11-24T10:{number // 60:02}:{number % 60:02}+00:00",
    )
    return msgspec.structs.replace(made, **changes)


def fill(folder: Path, files: Mapping[str, bytes] = FILES) -> Path:
    """Writes the files into the folder."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def publish(store: Store, number: int = 0, *, content: Mapping[str, bytes] = FILES, **changes: Any) -> Stored:
    """Publishes an artifact with these files."""
    return store.publish(fill(store.staging(), content), manifest(number, **changes))


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file below the folder, by relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def without_rights() -> Iterator[None]:
    """Within, this process may write only where everybody may, even if root runs it."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
