"""Train ``handwriting-tiny`` within a time budget; stop it at any moment and start it again to go on.

Three losses share every step. On rendered lines, where the place of each character is known: which character lies
under each thin frame, and where the decoder should look to write the next one. On all lines: CTC from the encoder
(after a short start) and the decoder's own cross-entropy, the one that counts. The aids fade; the last stretch is the
decoder's. Telling the attention where to look makes the decoder read within minutes instead of hours.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import VisionEncoderDecoderModel

from .data import Batch, Lines, Mixer, attention_targets, normalise_pixels, read_real
from .evaluate import error_rate, read_folder, read_lines
from .export import export
from .model import Helpers, build, column_attention
from .render import squash
from .split import HELD_OUT_WRITERS
from .vocabulary import PAD, decode

BATCH = 24
PEAK_RATE = 1.2e-3
AVERAGE = 0.999


@dataclass
class Weights:
    """How much each aid counts, and how much of a batch is real, at a point of the budget (0..1)."""

    frames: float
    attention: float
    ctc: float
    real: float
    rate: float


def ramp(value: float, start: float, end: float) -> float:
    """0 before start, 1 after end, straight in between."""
    return min(1.0, max(0.0, (value - start) / (end - start)))


def schedule(progress: float, step: int) -> Weights:
    """The plan: places first, then reading, then real hands; the rate falls to nothing at the end."""
    rate = PEAK_RATE * min(1.0, step / 400) * (0.5 + 0.5 * math.cos(math.pi * ramp(progress, 0.15, 1.0)))
    return Weights(
        frames=1.0 - 0.9 * ramp(progress, 0.06, 0.30),
        attention=1.0 - 0.95 * ramp(progress, 0.12, 0.40),
        ctc=0.5 * ramp(progress, 0.02, 0.05) - 0.25 * ramp(progress, 0.5, 0.9),
        real=0.15 + 0.20 * ramp(progress, 0.03, 0.10) + 0.20 * ramp(progress, 0.25, 0.6),
        rate=rate,
    )


def losses(
    model: VisionEncoderDecoderModel, helpers: Helpers, batch: Batch, weights: Weights
) -> dict[str, torch.Tensor]:
    """All losses of a batch, unweighted."""
    with torch.autocast("cpu", torch.bfloat16):
        pixels = batch.pixels.contiguous(memory_format=torch.channels_last)
        hidden = model.encoder(pixel_values=pixels)[0]
        out = model.decoder(
            input_ids=batch.inputs, encoder_hidden_states=hidden, output_attentions=True, use_cache=False
        )
        frames = helpers(hidden)
    found = {
        "read": F.cross_entropy(
            out.logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=PAD, label_smoothing=0.02
        )
    }
    logs = frames.float().log_softmax(-1)
    if batch.known.any():
        found["frames"] = F.nll_loss(logs[batch.known].flatten(0, 1), batch.frame_labels[batch.known].flatten())
        targets, have = attention_targets(batch.centres)
        # The first layer has not looked yet and cannot know how far reading has come; the later ones can.
        looks = [column_attention(look.float()) for look in out.cross_attentions[1:]]
        wrong = [-(targets * look.clamp_min(1e-5).log()).sum(-1)[have].mean() for look in looks]
        found["attention"] = torch.stack(wrong).mean()
    if weights.ctc > 0:
        targets_flat = torch.cat([row[:length] for row, length in zip(batch.labels, batch.lengths, strict=True)])
        lengths = torch.full((len(batch.lengths),), logs.shape[1])
        ctc = F.ctc_loss(logs.transpose(0, 1), targets_flat, lengths, batch.lengths, PAD, "none", zero_infinity=True)
        found["ctc"] = (ctc / batch.lengths).mean()
    return found


class Trainer:
    """Model, average, optimizer and clock, with checkpoints."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.model, self.helpers = build(), Helpers()
        self.model.encoder.embeddings.backbone.to(memory_format=torch.channels_last)
        parameters = list(self.model.parameters()) + list(self.helpers.parameters())
        decay = [p for p in parameters if p.ndim > 1]
        plain = [p for p in parameters if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=True)
        self.step, self.elapsed = 0, 0.0
        self.average = copy.deepcopy(self.model).eval()
        self.path = work / "checkpoint.pt"
        if self.path.exists():
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.helpers.load_state_dict(state["helpers"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.elapsed = state["step"], state["elapsed"]
            print(f"resumed at step {self.step}, {self.elapsed / 60:.1f} minutes in", flush=True)

    def save(self) -> None:
        """A checkpoint, whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "helpers": self.helpers.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed": self.elapsed,
        }
        partial = self.path.with_suffix(".tmp")
        torch.save(state, partial)
        os.replace(partial, self.path)

    def follow(self) -> None:
        """Move the average towards the model; running statistics of the normalisations are averaged as well."""
        keep = min(AVERAGE, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            old, new = self.average.state_dict(), self.model.state_dict()
            pairs = [(a, b) for a, b in zip(old.values(), new.values(), strict=True) if a.is_floating_point()]
            torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], 1 - keep)

    def train_step(self, batch: Batch, weights: Weights) -> dict[str, float]:
        """One step; the values of the losses."""
        for group in self.optimizer.param_groups:
            group["lr"] = weights.rate
        found = losses(self.model, self.helpers, batch, weights)
        total = found["read"]
        for name in ("frames", "attention", "ctc"):
            if name in found:
                total = total + getattr(weights, name) * found[name]
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.follow()
        return {name: float(value.detach()) for name, value in found.items()}


def load_tests(folders: list[Path], limit: int) -> dict[str, tuple[torch.Tensor, list[str]]]:
    """A fixed part of each test folder, ready for the model."""
    from PIL import Image

    tests = {}
    for folder in folders:
        rows = read_folder(folder)
        rows = rows[:: max(1, len(rows) // limit)][:limit]
        images = torch.stack([torch.from_numpy(squash(Image.open(path)).copy()) for path, _ in rows])
        tests[folder.name] = (normalise_pixels(images.float()[:, None] / 255), [text for _, text in rows])
    return tests


def report(trainer: Trainer, tests: dict[str, tuple[torch.Tensor, list[str]]], note: str) -> float:
    """Log the decoder's and the helper head's error rates on the tests, and return the mean of the decoder's."""
    scores, lines = [], []
    for name, (pixels, texts) in tests.items():
        guesses = read_lines(trainer.average, pixels, decode)
        scores.append(error_rate(list(zip(texts, guesses, strict=True))))
        with torch.inference_mode():
            best = trainer.helpers(trainer.average.encoder(pixel_values=pixels)[0]).argmax(-1)
        merged = [decode([t for i, t in enumerate(r) if i == 0 or t != r[i - 1]]) for r in best.tolist()]
        lines.append(f"{name} {scores[-1]:.4f} (ctc {error_rate(list(zip(texts, merged, strict=True))):.4f})")
        for truth, guess in list(zip(texts, guesses, strict=True))[::60]:
            print(f"    {truth!r} read as {guess!r}", flush=True)
    line = f"{time.strftime('%H:%M:%S')} step {trainer.step} minutes {trainer.elapsed / 60:.1f}: " + ", ".join(lines)
    with (trainer.work / "metrics.log").open("a", encoding="utf-8") as log:
        log.write(line + note + "\n")
    print(line, flush=True)
    return sum(scores) / len(scores)


def main() -> None:
    """Train until the budget is spent."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "--work", type=Path, required=True, help="holds shards/, and gets checkpoints, logs and export/"
    )
    parser.add_argument("--data", type=Path, required=True, help="real lines: dhsd/ and peraire/, each with labels.tsv")
    parser.add_argument("--tests", type=Path, nargs="*", default=[], help="test folders, for the log")
    parser.add_argument("--minutes", type=float, default=110.0)
    parser.add_argument("--report-minutes", type=float, default=10.0)
    parser.add_argument("--test-lines", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    trainer = Trainer(arguments.work)
    torch.manual_seed(trainer.step)
    dhsd = read_real(arguments.data / "dhsd", drop=set(HELD_OUT_WRITERS))
    real: list[tuple[float, Lines]] = [(0.9, dhsd), (0.1, read_real(arguments.data / "peraire"))]
    mixer = Mixer(real, arguments.work / "shards", seed=trainer.step)
    tests = load_tests(arguments.tests, arguments.test_lines)
    print(json.dumps({"real": [len(lines.texts) for _, lines in real], "shards": len(mixer.rendered)}), flush=True)
    best_path = arguments.work / "best.json"
    best = json.loads(best_path.read_text())["error"] if best_path.exists() else math.inf
    last_save = last_report = time.monotonic()
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    budget = arguments.minutes * 60
    while trainer.elapsed < budget:
        began = time.monotonic()
        trainer.model.train()
        weights = schedule(trainer.elapsed / budget, trainer.step)
        strength = 0.4 + 0.6 * ramp(trainer.elapsed / budget, 0.03, 0.15)
        values = trainer.train_step(mixer.batch(BATCH, weights.real, strength, token_noise=0.06), weights)
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value
            counts[name] = counts.get(name, 0) + 1
        if trainer.step % 100 == 0:
            means = " ".join(f"{name} {sums[name] / counts[name]:.3f}" for name in sums)
            print(f"{trainer.step} {trainer.elapsed / 60:.1f}m rate {weights.rate:.5f} {means}", flush=True)
            sums, counts = {}, {}
        now = time.monotonic()
        if now - last_save > 300:
            trainer.save()
            mixer.refresh()
            last_save = now
        if now - last_report > arguments.report_minutes * 60:
            error = report(trainer, tests, "")
            if error < best:
                best = error
                export(trainer.average, arguments.work / "export")
                best_path.write_text(json.dumps({"error": best, "step": trainer.step}))
            last_report = time.monotonic()
        trainer.elapsed += time.monotonic() - began
    trainer.save()
    error = report(trainer, tests, " (end)")
    if error < best:
        export(trainer.average, arguments.work / "export")
        best_path.write_text(json.dumps({"error": error, "step": trainer.step}))


if __name__ == "__main__":
    main()
