"""What every training stage shares: the clock, checkpoints, averaged weights and the optimizer."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Clock:
    """Training time as progress from 0 to 1, counted across restarts, so that learning rates follow a time budget."""

    def __init__(self, minutes: float, spent: float = 0.0) -> None:
        self.budget = minutes * 60
        self._before = spent
        self._start = time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds trained so far, earlier runs included."""
        return self._before + time.monotonic() - self._start

    @property
    def progress(self) -> float:
        """Share of the budget that is used up, at most 1."""
        return min(1.0, self.spent / self.budget)

    def rate(self, warmup: float = 0.02) -> float:
        """Learning-rate multiplier: a short linear warm-up, then a cosine down to zero."""
        p = self.progress
        return p / warmup if p < warmup else 0.5 * (1 + math.cos(math.pi * (p - warmup) / (1 - warmup)))


class Average:
    """Exponential moving average of a module's weights; the window grows with the number of steps up to `decay`."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take one step towards the current weights of `module`."""
        self.steps += 1
        weight = 1 - min(self.decay, self.steps / (self.steps + 10))
        mine = list(self.module.parameters())
        torch._foreach_lerp_(mine, list(module.parameters()), weight)


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix, approximately, by the quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    # Not bfloat16: a CPU without instructions for it took forty times as long.
    x = matrix.float()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized updates, for the weight matrices (convolutions count as matrices).

    On one core every step is dear: an update that costs a quarter more and uses all directions of a matrix pays.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95, decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                buffer = state.setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"]).reshape(p.shape[0], -1)
                update = orthogonalize(update)
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(update.view_as(p), alpha=-group["lr"] * scale)


class Optimizer:
    """Muon for the matrices and AdamW for everything else (biases, norms, embeddings, first and last layers)."""

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]],
        adam_only: tuple[str, ...],
        muon_lr: float,
        adam_lr: float,
    ) -> None:
        matrices, rest = [], []
        for name, p in named:
            is_matrix = p.ndim >= 2 and not any(word in name for word in adam_only)
            (matrices if is_matrix else rest).append(p)
        self.parts: list[torch.optim.Optimizer] = []
        if rest:
            self.parts.append(torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0))
        if matrices:
            self.parts.append(Muon(matrices, lr=muon_lr))
        self.base = [[g["lr"] for g in part.param_groups] for part in self.parts]
        self.params = matrices + rest

    def step(self, rate: float, clip: float = 1.0) -> None:
        """Clip, update with the learning rates times `rate`, and clear the gradients."""
        torch.nn.utils.clip_grad_norm_(self.params, clip)
        for part, base in zip(self.parts, self.base, strict=True):
            for group, lr in zip(part.param_groups, base, strict=True):
                group["lr"] = lr * rate
            part.step()
            part.zero_grad()

    def state_dict(self) -> list[dict[str, Any]]:
        """State of both optimizers."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Restore what `state_dict` returned."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a reader, or a killed process, never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def restore(path: Path) -> dict[str, Any] | None:
    """Read a checkpoint of ours, or None when there is none yet."""
    return torch.load(path, weights_only=True) if path.exists() else None


def log(work: Path, stage: str, **values: float | int | str) -> None:
    """Print one line of measurements and append it to `log.jsonl`."""
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}
    record = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "stage": stage, **rounded}
    print(json.dumps(record), flush=True)
    with (work / "log.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB for pictures in 0..1."""
    return -10 * math.log10(max(mse, 1e-10))
