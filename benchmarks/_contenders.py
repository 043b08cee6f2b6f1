"""The ways to read lines that `ocr_throughput` compares: transformers' `generate`, Inkwell's engine, and its service.

Each takes the same lines and answers the token ids of every one, in their order. Decoding the PNG and preparing the
pixels is part of the work of all.
"""

import io
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import msgspec
import psutil
import torch
from PIL import Image
from transformers import StoppingCriteria, VisionEncoderDecoderModel

from benchmarks._running import running
from benchmarks._trocr_base import Line
from inkwell import Client
from services import local
from services.kit.engine_api import Failed, Finished, Raw
from services.ocr import domain
from services.ocr.engine.main import OcrEngine, create_engine
from services.ocr.settings import Settings


class _OwnLengths(StoppingCriteria):  # type: ignore[misc]
    """Ends each row of a batch at its own length."""

    def __init__(self, token_counts: Sequence[int]) -> None:
        self._token_counts = torch.tensor(token_counts)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids.shape[1] - 1 >= self._token_counts  # without the start token


class Generate:
    """transformers' `generate`, so many lines at a time in the order they come."""

    def __init__(self, model: VisionEncoderDecoderModel, processor: Any, batch_size: int) -> None:
        self._model, self._processor, self._batch_size = model, processor, batch_size

    @torch.inference_mode()
    def read(self, lines: Sequence[Line]) -> list[list[int]]:
        texts: list[list[int]] = []
        for start in range(0, len(lines), self._batch_size):
            batch = lines[start : start + self._batch_size]
            images = [Image.open(io.BytesIO(line.png)).convert("RGB") for line in batch]
            counts = [line.token_count for line in batch]
            sequences = self._model.generate(
                self._processor(images, return_tensors="pt")["pixel_values"],
                do_sample=False,
                num_beams=1,
                max_new_tokens=max(counts),
                stopping_criteria=[_OwnLengths(counts)],
            )
            texts += [ids[1 : 1 + count] for ids, count in zip(sequences.tolist(), counts, strict=True)]
        return texts


class Engine:
    """Inkwell's engine without gRPC, so many lines given to it at a time, in a process like the one that serves it.

    A process of its own, because native libraries take their settings when they are first loaded: here transformers
    came first, as it does for who calls `generate`, and OpenMP's threads wait otherwise than in the service.
    """

    def __init__(self, settings: Settings, callers: int) -> None:
        self._process = ProcessPoolExecutor(
            1,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_open_engine,
            initargs=(settings.model_dump_json(), callers),
        )

    def read(self, lines: Sequence[Line]) -> list[list[int]]:
        return self._process.submit(_read_in_engine, list(lines)).result()

    def close(self) -> None:
        self._process.shutdown()


def _open_engine(settings_json: str, callers: int) -> None:
    """Runs in the engine's process, which imports `services` before torch as the service does."""
    global _in_process
    _in_process = _InProcess(settings_json, callers)


def _read_in_engine(lines: Sequence[Line]) -> list[list[int]]:
    return _in_process.read(lines)


class _InProcess:
    def __init__(self, settings_json: str, callers: int) -> None:
        self._engine: OcrEngine = create_engine(settings_json)
        self._model = Settings.model_validate_json(settings_json).default_model_name
        self._callers = callers

    def read(self, lines: Sequence[Line]) -> list[list[int]]:
        texts: dict[int, list[int]] = {}
        waiting = iter(enumerate(lines))
        self._submit(waiting, self._callers)
        while len(texts) < len(lines):
            for event in self._engine.step():
                if isinstance(event, Failed):
                    raise RuntimeError(event.fault.message)
                if isinstance(event, Finished):
                    read = msgspec.msgpack.decode(event.payload, type=domain.Recognition)
                    texts[int(event.job)] = [token.id for token in read.hypotheses[0].tokens]
                    self._submit(waiting, 1)
        return [texts[number] for number in range(len(lines))]

    def _submit(self, waiting: Iterator[tuple[int, Line]], count: int) -> None:
        for _, (number, line) in zip(range(count), waiting, strict=False):
            image = Image.open(io.BytesIO(line.png)).convert("RGB")
            job = domain.ReadJob(
                model=self._model,
                line=domain.Line(image.width, image.height, image.tobytes()),
                decoding=domain.Decoding(1, 1, 1.0, line.token_count),
                partials=False,
            )
            self._engine.submit(str(number), Raw(msgspec.msgpack.encode(job)))


_in_process: _InProcess


class Service:
    """Inkwell over gRPC, so many callers at a time."""

    def __init__(self, service: local.Service, callers: int) -> None:
        self._process = psutil.Process(service.pid)
        self._client = Client(service.address, timeout_s=None)
        self._callers = ThreadPoolExecutor(callers)

    def read(self, lines: Sequence[Line]) -> list[list[int]]:
        def call(line: Line) -> list[int]:
            reading = self._client.read(line.png, beam_width=1, max_new_token_count=line.token_count)
            return [token.id for token in reading.hypotheses[0].tokens]

        return list(self._callers.map(call, lines))

    def memory_bytes(self) -> int:
        """Resident size of the front and its engine together."""
        processes = [self._process, *self._process.children(recursive=True)]
        return sum(process.memory_info().rss for process in processes)

    def close(self) -> None:
        self._callers.shutdown()
        self._client.close()


@contextmanager
def served(settings: Settings, callers: int) -> Iterator[Service]:
    """The OCR service with these settings, in processes of its own, ready to read."""
    with running("ocr", settings) as process:
        service = Service(process, callers)
        try:
            yield service
        finally:
            service.close()
