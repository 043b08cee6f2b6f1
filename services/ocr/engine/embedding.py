"""Encoder states of images, pooled or whole, a few images a step."""

import time
from collections import deque
from dataclasses import dataclass, field

import msgspec
import torch
from torch import Tensor

from services.kit import faults
from services.kit.engine_api import Accepted, Failed, Finished, JobEvent, Raw
from services.ocr.domain import Embedding, EmbedJob
from services.ocr.engine.model import ReadingModel
from services.runtimes.sessions.interface import SessionError

_encoder = msgspec.msgpack.Encoder()


@dataclass
class _Embedding:
    """A call under way; `done` holds a tensor for each step that it had."""

    job_id: str
    job: EmbedJob
    accepted: bool = False
    taken: int = 0  # images that are encoded
    done: list[Tensor] = field(default_factory=list)


@dataclass
class Embedder:
    """Embeds with one model. All methods are called on one thread.

    batch_size: images encoded together at most, fewer if that would take longer than about step_s seconds. Calls take
    turns, and no two share a batch, so that one of many images does not hold up the others and what a call gets does
    not depend on them.
    """

    model: ReadingModel
    batch_size: int
    step_s: float
    _turns: deque[_Embedding] = field(default_factory=deque, init=False)
    _image_s: float = field(default=0.0, init=False)  # what encoding one image takes, a moving average

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._turns)

    def submit(self, job_id: str, job: EmbedJob) -> None:
        """Take in a call of at least one image."""
        self._turns.append(_Embedding(job_id, job))

    def cancel(self, job_id: str) -> bool:
        """Drop a call; False if it is not here."""
        for embedding in self._turns:
            if embedding.job_id == job_id:
                self._turns.remove(embedding)
                return True
        return False

    def step(self) -> list[JobEvent]:
        """Accept what is new, else encode some images of the next call; says what came."""
        fresh = [embedding for embedding in self._turns if not embedding.accepted]
        for embedding in fresh:
            embedding.accepted = True
        if fresh:
            return [Accepted(embedding.job_id) for embedding in fresh]
        embedding = self._turns.popleft()
        try:
            self._encode(embedding)
        except SessionError as error:
            # As one fails that a remote server runs.
            fault = faults.unavailable("RUNTIME_FAILED", f"the model's runtime failed: {error}", retry_after_ms=1000)
            return [Failed(embedding.job_id, fault.data)]
        if embedding.taken < len(embedding.job.lines):
            self._turns.append(embedding)
            return []
        return [self._finish(embedding)]

    def _encode(self, embedding: _Embedding) -> None:
        most = self.batch_size
        if self._image_s:
            most = max(1, min(most, int(self.step_s / self._image_s)))
        lines = embedding.job.lines[embedding.taken : embedding.taken + most]
        began = time.perf_counter()
        states = self.model.networks.states(self.model.prepare(lines))
        # Pooled at once: whole states of many images are large.
        embedding.done.append(pool(states, embedding.job.pooling).cpu())
        embedding.taken += len(lines)
        taken = (time.perf_counter() - began) / len(lines)
        self._image_s = taken if not self._image_s else 0.8 * self._image_s + 0.2 * taken

    def _finish(self, embedding: _Embedding) -> JobEvent:
        job = embedding.job
        vectors = torch.cat(embedding.done)
        if job.normalize:
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        if job.dtype == "float16":
            vectors = vectors.to(torch.float16)
        if not torch.isfinite(vectors).all():
            what = "do not fit into float16; ask for float32" if job.dtype == "float16" else "are not finite numbers"
            fault = faults.failed_precondition(
                "EMBEDDING_NOT_FINITE", f"the states of {job.model} {what}", model=job.model, dtype=job.dtype
            )
            return Failed(embedding.job_id, fault.data)
        numbers = vectors.contiguous().numpy()
        little_endian = numbers.astype(numbers.dtype.newbyteorder("<"), copy=False)
        content = Embedding(little_endian.tobytes(), job.dtype, tuple(vectors.shape))
        return Finished(embedding.job_id, Raw(_encoder.encode(content)))


def pool(states: Tensor, pooling: str) -> Tensor:
    """Encoder states [images, tokens, width] as float32: "mean" or "cls" [images, width], "none" as they are."""
    if pooling == "none":
        return states.float()
    if pooling == "cls":
        return states[:, 0].float()
    return states.float().mean(dim=1)
