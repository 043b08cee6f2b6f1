"""The training loop: the library's Trainer with our order of lines, clock, averaged weights, and character error rate.

Checkpoints are written by the library; ours adds the average and the clock and, as the very last file, a marker. A
checkpoint without its marker was cut short (kill -9, a full disk) and is thrown away on resuming.
"""

import copy
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rapidfuzz.distance import Levenshtein
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import SequentialSampler
from transformers import GenerationConfig, Trainer, TrainerCallback

from services.ocr.finetune.batches import IGNORED, eval_pixels

COMPLETE = "complete.json"
WEIGHTS = "weights.safetensors"
AVERAGE = "average.safetensors"
_READ_TOGETHER = 32
_LEAST_RATE = 0.01  # share of the peak rate that is left at the end


@dataclass
class ReadingSet:
    """Lines to read for a measure: stored images, and what they say."""

    name: str
    images: Any
    texts: Sequence[str]


@dataclass
class Progress:
    """What a restart must know besides the library's own state."""

    elapsed: float = 0.0  # seconds of training, over all restarts
    evaluated: int = 0  # evaluations due so far
    best_cer: float = math.inf
    best_step: int = 0
    stale: int = 0  # evaluations since the best
    history: list[dict[str, float]] = field(default_factory=list)


class Clock(TrainerCallback):  # type: ignore[misc]
    """Decides when to evaluate, save and stop; the same in all processes, because the first one's clock counts."""

    def __init__(
        self,
        *,
        steps: int,
        seconds: float,
        evaluations: int,
        save_seconds: float,
        warmup: int,
        patience: int,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.steps, self.seconds = steps, seconds
        self.evaluations, self.save_seconds = evaluations, save_seconds
        self.warmup, self.patience = warmup, patience
        self.progress = Progress()
        self.share = 0.0  # of the run that is done, 0..1
        self.stop_asked = False
        self._now = now
        self._before = 0.0
        self._began = now()
        self._saved = 0.0

    def start(self) -> None:
        """Begin to count, from what the progress says."""
        self._before, self._began, self._saved = self.progress.elapsed, self._now(), self.progress.elapsed

    def factor(self, step: int) -> float:
        """The learning rate at a step as a share of its peak: a straight warm-up, then half a cosine."""
        share = max(self.share, step / self.steps)
        falling = 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
        return min(1.0, (step + 1) / max(1, self.warmup)) * max(_LEAST_RATE, falling)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the clock once for this step, in agreement with the other processes."""
        values = torch.tensor([self._before + self._now() - self._began, self.stop_asked], dtype=torch.float64)
        if args.world_size > 1:
            values = values.to(args.device)
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        self.progress.elapsed, self.stop_asked = float(values[0]), bool(values[1])
        self._reckon(state.global_step)

    def _reckon(self, step: int) -> None:
        by_time = self.progress.elapsed / self.seconds if self.seconds else 0.0
        self.share = max(step / self.steps, by_time)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for what is due."""
        self._reckon(state.global_step)
        ended = self.share >= 1 or self.stop_asked
        due = math.floor(min(1.0, self.share) * self.evaluations + 1e-9)
        if due > self.progress.evaluated or ended:
            self.progress.evaluated = due
            control.should_evaluate = control.should_save = control.should_log = True
        if self.progress.elapsed - self._saved > self.save_seconds:
            self._saved = self.progress.elapsed
            control.should_save = True
        if ended or (self.patience and self.progress.stale >= self.patience):
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What the last step asked for is done; the library would do it again."""
        control.should_evaluate = control.should_save = control.should_log = False


class ReadingTrainer(Trainer):  # type: ignore[misc]
    """Trains on a plan of lines and judges by reading the validation lines with the averaged weights."""

    def __init__(
        self,
        *,
        clock: Clock,
        still: Sequence[nn.Module],
        label_smoothing: float,
        average: float,
        validation: ReadingSet | None,
        read: Callable[[nn.Module, ReadingSet], tuple[int, int]],
        best_path: Path,
        **kwargs: Any,
    ) -> None:
        self.clock, self.still, self.smoothing = clock, list(still), label_smoothing
        self.decay, self.validation, self._read, self.best_path = average, validation, read, best_path
        self.reader = copy.deepcopy(kwargs["model"]).eval()  # holds the average
        super().__init__(compute_loss_func=self._loss, **kwargs)
        self.reader.to(self.args.device)
        self.add_callback(clock)
        self.add_callback(_Follow(self))

    # --- what is learnt ---

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset or self.train_dataset)  # the plan is shuffled already

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The library's, with the frozen parts kept in evaluation mode."""
        for module in self.still:
            module.training = False
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        total = F.cross_entropy(
            outputs.logits.float().flatten(0, 1),
            labels.flatten(),
            ignore_index=IGNORED,
            label_smoothing=self.smoothing,
            reduction="sum",
        )
        return total / (num_items_in_batch if num_items_in_batch is not None else (labels != IGNORED).sum())

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The clock's factor in place of a schedule by steps alone."""
        scheduler: Any = getattr(self, "lr_scheduler", None)
        if scheduler is None:
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, self.clock.factor)
            self.lr_scheduler = scheduler
            self._created_lr_scheduler = True
        return scheduler

    def follow(self) -> None:
        """Move the average towards the model; young averages move faster."""
        step = self.state.global_step
        keep = min(self.decay, (1 + step) / (10 + step))
        target = self.accelerator.unwrap_model(self.model).state_dict()
        with torch.no_grad():
            pairs = [(old, target[name]) for name, old in self.reader.state_dict().items()]
            floats = [(old, new.to(old.dtype)) for old, new in pairs if old.is_floating_point()]
            torch._foreach_lerp_([old for old, _ in floats], [new for _, new in floats], 1 - keep)
            for old, new in pairs:
                if not old.is_floating_point():
                    old.copy_(new)

    # --- how it is judged ---

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Read the validation lines; remember the weights if no reading was better."""
        if self.validation is None:
            return {}
        cer = self.error_rate(self.validation)
        progress = self.clock.progress
        progress.history.append({"step": self.state.global_step, "cer": cer})
        if cer < progress.best_cer:
            progress.best_cer, progress.best_step, progress.stale = cer, self.state.global_step, 0
            self.remember_best()
        else:
            progress.stale += 1
        metrics = {"eval_cer": cer, "eval_best_cer": progress.best_cer}
        self.log(dict(metrics))
        return metrics

    def error_rate(self, lines: ReadingSet) -> float:
        """Character error rate of the averaged weights; the processes read a share each."""
        edits, characters = self._read(self.reader, lines)
        values = torch.tensor([edits, characters], dtype=torch.float64)
        if self.args.world_size > 1:
            values = values.to(self.args.device)
            dist.all_reduce(values)
        return float(values[0] / values[1].clamp_min(1))

    def remember_best(self) -> None:
        """Keep the averaged weights as they are now as the best."""
        if self.args.should_save:
            _save_state(self.reader, self.best_path)

    # --- checkpoints ---

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Weights under their names in memory.

        The library's own files hold those of older releases (of ViT, for one), and its resuming ignores what it does
        not find: such a run would go on with the base's encoder.
        """
        if self.args.should_save:
            _save_state(self.accelerator.unwrap_model(self.model), Path(output_dir or self.args.output_dir) / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_state(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint) / WEIGHTS)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # keeps the one before, which is whole
        self.wait_for_others()
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            _save_state(self.reader, folder / AVERAGE)
            write_json(folder / COMPLETE, asdict(self.clock.progress))

    def wait_for_others(self) -> None:
        """Return when all processes are here."""
        if self.args.world_size > 1:
            dist.barrier()

    def restore(self, checkpoint: Path) -> None:
        """Take up the average and the clock of a checkpoint."""
        self.reader.load_state_dict(load_file(checkpoint / AVERAGE, device=str(self.args.device)))
        self.clock.progress = Progress(**json.loads((checkpoint / COMPLETE).read_text("utf-8")))


class _Follow(TrainerCallback):  # type: ignore[misc]
    """Keeps the average and starts the clock."""

    def __init__(self, trainer: ReadingTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.clock.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.follow()


def reader_for(
    processor: Any, tokenizer: Any, generation: GenerationConfig, *, rank: int, world: int, max_length: int
) -> Callable[[nn.Module, ReadingSet], tuple[int, int]]:
    """A function that reads this process's share of lines greedily and answers edits and characters of the truth."""
    greedy = GenerationConfig(
        decoder_start_token_id=generation.decoder_start_token_id,
        bos_token_id=generation.bos_token_id,
        eos_token_id=generation.eos_token_id,
        pad_token_id=generation.pad_token_id,
        max_length=max_length,
        num_beams=1,
        do_sample=False,
    )

    def read(model: Any, lines: ReadingSet) -> tuple[int, int]:
        # Lines of like length end at like times.
        order = sorted(range(len(lines.texts)), key=lambda index: len(lines.texts[index]))[rank::world]
        edits = characters = 0
        for start in range(0, len(order), _READ_TOGETHER):
            part = order[start : start + _READ_TOGETHER]
            with torch.inference_mode():
                pixels = eval_pixels(lines.images[part], processor).to(model.device)
                ids = model.generate(pixel_values=pixels, generation_config=greedy)
            for index, row in zip(part, ids.tolist(), strict=True):
                text = tokenizer.decode(row, skip_special_tokens=True).strip()
                edits += Levenshtein.distance(lines.texts[index], text)
                characters += len(lines.texts[index])
        return edits, characters

    return read


def _save_state(model: nn.Module, path: Path) -> None:
    """Write weights, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Cloned: tied weights share memory, which the file format refuses.
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}, partial)
    _settle(partial, path)


def load_state(model: nn.Module, path: Path) -> None:
    """Read back what training kept."""
    model.load_state_dict(load_file(path))


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False), "utf-8")
    _settle(partial, path)


def _settle(partial: Path, path: Path) -> None:
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    found = sorted(
        (path for path in folder.glob("checkpoint-*") if (path / COMPLETE).is_file()),
        key=lambda path: int(path.name.rpartition("-")[2]),
    )
    return found[-1] if found else None


def drop_broken_checkpoints(folder: Path) -> None:
    """Remove checkpoints that a killed run left unfinished."""
    for path in folder.glob("checkpoint-*"):
        if not (path / COMPLETE).is_file():
            shutil.rmtree(path)
