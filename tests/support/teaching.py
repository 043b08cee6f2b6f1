"""Small labelled folders and runs of fine-tuning that take seconds."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import typer
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("ab", "cd", "ef", "gh", "ij", "kl", "mn", "op")


def write_lines(folder: Path, rows: Sequence[tuple[str, str]], *, header: str = "file\ttext\twriter") -> Path:
    """A folder with labels.tsv; each row is (text, writer), its image shows the text."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = [header]
    for number, (text, writer) in enumerate(rows):
        image = Image.new("L", (16 + 10 * len(text), 20), 255)
        ImageDraw.Draw(image).text((6, 4), text, fill=0)
        image.save(folder / f"{number}.png")
        labels.append("\t".join((f"{number}.png", text, writer)[: header.count("\t") + 1]))
    (folder / "labels.tsv").write_text("\n".join(labels) + "\n", "utf-8")
    return folder


def command(data: Path, base: Path, output: Path, *options: str) -> list[str]:
    """Arguments behind the interpreter for a small run that computes exactly: float32, no distortion."""
    return [
        *("-m", "services.ocr.finetune", "--data", str(data), "--base", str(base), "--output", str(output)),
        *("--validation", str(data), "--precision", "fp32", "--no-augment", "--token-noise", "0", "--rate", "2e-3"),
        *("--batch", "4", "--patience", "0", "--weights", "float32", *options),
    ]


def environment() -> dict[str, str]:
    """Of a child process: one thread, quiet."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200"}


def finetune(*arguments: str, expect: int = 0) -> str:
    """Run it to its end in this process, on one thread as children do; answers everything it printed."""
    import torch
    from typer.testing import CliRunner

    from services.ocr.finetune.__main__ import command as finetune_command

    app = typer.Typer()
    app.command()(finetune_command)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        done = CliRunner().invoke(app, arguments[2:], env={"COLUMNS": "200"})
    finally:
        torch.set_num_threads(threads)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == expect, done.output
    return done.output


def finetune_in_children(*arguments: str, processes: int) -> None:
    """Run it to its end in several processes, as torchrun does."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    done = subprocess.run(
        [sys.executable, *launcher, *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=290,  # before that of pytest, to say what it printed
        check=False,
    )
    assert done.returncode == 0, done.stdout
