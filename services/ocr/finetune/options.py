"""What a run is asked to do."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from services.ocr.finetune.rows import DatasetColumns, Row
from services.ocr.finetune.vocabulary import Choice

# Another value of these does not make another run.
_FREE = ("output", "restart", "workers", "compile_encoder", "cache", "save_minutes", "test", "processes")


class Refused(Exception):
    """The run cannot start as asked; a line of text for each reason."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


@dataclass(frozen=True)
class Options:
    """Every choice of a run. Counts of lines are over all processes together."""

    data: tuple[str, ...]  # folders with labels.tsv, each maybe with =share
    dataset: tuple[str, ...]  # Hugging Face datasets, each maybe with =share
    columns: DatasetColumns
    output: Path
    base: str
    validation: tuple[str, ...]  # folders that are only read to choose; empty: a part of the data
    validation_share: float
    validation_writers: tuple[str, ...]
    validation_lines: int  # at most, 0: all
    test: tuple[str, ...]  # folders that are read before and after, and choose nothing
    freeze: str
    vocabulary: Choice
    scratch: bool
    steps: int  # 0: by epochs
    epochs: float
    minutes: float  # 0: no limit
    batch: int
    accumulate: int
    rate: float  # 0: by the model's size
    warmup: int
    weight_decay: float
    label_smoothing: float
    token_noise: float
    strength: float  # of the distortion; 0: none
    learn_statistics: bool
    average: float  # of the weights, per step; 0: none
    precision: str  # "fp32", "bf16" or "fp16", resolved
    patience: int  # evaluations without improvement before stopping; 0: never
    evaluations: int
    keep: str  # "best" or "last"
    save_minutes: float
    weights: str  # "float16" or "float32": the type of the model written
    languages: tuple[str, ...]
    seed: int
    workers: int
    compile_encoder: bool
    restart: bool
    cache: Path | None

    @property
    def training(self) -> Path:
        """Where checkpoints, logs and the cache go; the output folder holds the model and nothing else."""
        return self.output.with_name(self.output.name + ".training")

    def fingerprint(self, rows: Sequence[Row]) -> dict[str, Any]:
        """What must be equal for a checkpoint to belong to this run: the choices and the data."""
        digest = hashlib.sha256()
        for row in rows:
            digest.update(f"{row.name}\t{row.text}\t{row.writer}\t{row.stamp}\n".encode())
        values = {name: value for name, value in asdict(self).items() if name not in _FREE}
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {**values, "data_digest": digest.hexdigest()[:16]}
