"""Fine-tuning as it is used: from labelled lines to a model that the engine reads with, killed and in two processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from services.kit.engine_api import Engine, Failed, Finished, Raw
from services.ocr import images
from services.ocr.catalog import card_languages
from services.ocr.domain import ReadJob, Recognition
from services.ocr.engine.main import create_engine
from services.ocr.finetune.rows import DEFAULT_LIMITS
from services.ocr.settings import Settings
from tests.support import tiny_trocr
from tests.support.reading import GREEDY
from tests.support.teaching import (
    ROOT,
    WORDS,
    command,
    environment,
    finetune,
    finetune_in_children,
    write_lines,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model without dropout: two runs of it compute the same."""
    model = tiny_trocr.build()
    model.config.decoder.dropout = 0.0
    model.decoder.config.dropout = 0.0
    return tiny_trocr.save(tmp_path_factory.mktemp("base") / "tiny", model)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("data") / "lines", [(word, "") for word in WORDS])


def read(engine: Engine, model: str, image: Path) -> str:
    """What the service's engine reads with a model, which it loads when it is first named."""
    line = images.decode(image.read_bytes(), DEFAULT_LIMITS)
    engine.submit("job", Raw(msgspec.msgpack.encode(ReadJob(model, line, GREEDY, False))))
    while True:
        for event in engine.step():
            assert not isinstance(event, Failed), event.fault
            if isinstance(event, Finished):
                return msgspec.msgpack.decode(event.payload, type=Recognition).hypotheses[0].text


def losses(output: Path) -> list[float]:
    """The curve of a finished run, a number every ten steps."""
    checkpoints = output.with_name(output.name + ".training") / "checkpoints"
    newest = max(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((newest / "trainer_state.json").read_text("utf-8"))["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model.safetensors")


def test_a_taught_model_reads_what_it_was_shown(base: Path, lines: Path, tmp_path: Path) -> None:
    output = tmp_path / "taught"
    engine = create_engine(Settings(models={"base": str(base)}, model_folder=str(tmp_path)).model_dump_json())
    assert read(engine, "base", lines / "0.png") != WORDS[0]
    printed = finetune(
        *command(lines, base, output, "--steps", "150", "--evaluations", "3", "--language", "de", "--test", str(lines))
    )
    assert "8 lines to train on" in printed
    cers = [line.split() for line in printed.splitlines() if line.startswith("CER") and "after" in line]
    assert all(float(words[1]) > 0.5 > 0.1 > float(words[3]) for words in cers), printed
    # An engine that has been running since before finds it in its folder of models.
    assert read(engine, "taught", lines / "0.png") == WORDS[0]
    assert read(engine, "taught", lines / "3.png") == WORDS[3]
    assert card_languages(output) == ("de",)
    assert "| validation | 8 |" in (output / "README.md").read_text("utf-8")
    # The line it prints to serve the model is the one that works.
    served = next(line.strip() for line in printed.splitlines() if "INKWELL_OCR_MODELS=" in line)
    assert json.loads(served.split("'")[1]) == {"taught": str(output)}
    assert any((tmp_path / "taught.training" / "logs").glob("events.out.tfevents*"))

    again = finetune(
        *command(lines, base, output, "--steps", "150", "--evaluations", "3", "--language", "de", "--test", str(lines))
    )
    assert "This run is finished" in again
    other = finetune(*command(lines, base, output, "--steps", "200", "--evaluations", "3"), expect=2)
    assert "holds a run with other settings" in other
    assert "steps: 150 there, 200 now" in other


def test_a_killed_run_goes_on_as_if_nothing_had_happened(base: Path, lines: Path, tmp_path: Path) -> None:
    settings = ("--steps", "60", "--evaluations", "10", "--keep", "last")
    finetune(*command(lines, base, tmp_path / "whole", *settings))
    output = tmp_path / "killed"
    arguments = [sys.executable, *command(lines, base, output, *settings)]
    running = subprocess.Popen(arguments, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    checkpoints = tmp_path / "killed.training" / "checkpoints"
    while not list(checkpoints.glob("*/complete.json")):
        assert running.poll() is None
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not output.exists()
    # As if it had been killed while it wrote one more.
    done = max(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    torn = checkpoints / "checkpoint-59"
    shutil.copytree(done, torn)
    (torn / "complete.json").unlink(missing_ok=True)
    (torn / "model.safetensors").write_bytes(b"half")

    printed = finetune(*command(lines, base, output, *settings))
    assert "Going on after step" in printed
    assert "Going on after step 59" not in printed
    one, other = weights(tmp_path / "whole"), weights(output)
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


def test_two_processes_learn_what_one_learns(base: Path, lines: Path, tmp_path: Path) -> None:
    settings = ("--steps", "40", "--evaluations", "1", "--keep", "last")
    finetune(*command(lines, base, tmp_path / "one", *settings))
    finetune_in_children(*command(lines, base, tmp_path / "two", *settings), processes=2)
    finetune(*command(lines, base, tmp_path / "parts", *settings, "--accumulate", "2"))
    one = losses(tmp_path / "one")
    assert len(one) == 4
    assert one[-1] < 0.7 * one[0]
    assert losses(tmp_path / "two") == pytest.approx(one, rel=1e-3)
    assert losses(tmp_path / "parts") == pytest.approx(one, rel=1e-3)


def test_a_bad_folder_is_refused_before_anything_starts(base: Path, tmp_path: Path) -> None:
    folder = write_lines(tmp_path / "lines", [("ab", "A"), ("cd", "B")])
    (folder / "1.png").unlink()
    with (folder / "labels.tsv").open("a", encoding="utf-8") as labels:
        labels.write("0.png\t\tB\n")
    printed = finetune(*command(folder, base, tmp_path / "out", "--steps", "5"), expect=2)
    assert f"{folder / 'labels.tsv'}:3: 1.png: No such file" in printed
    assert f"{folder / 'labels.tsv'}:4: file or text is empty" in printed
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.training" / "run.json").exists()


def test_a_stopped_run_leaves_a_model_and_goes_on(base: Path, lines: Path, tmp_path: Path) -> None:
    output = tmp_path / "stopped"
    arguments = [sys.executable, *command(lines, base, output, "--steps", "2000", "--evaluations", "200")]
    running = subprocess.Popen(arguments, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("step"):
            os.kill(running.pid, signal.SIGTERM)
            break
    printed = running.stdout.read()
    assert running.wait(timeout=120) == 0
    assert "Stopped before its end when asked to" in printed
    assert (output / "model.safetensors").is_file()
    assert "step 2000/2000" not in printed
