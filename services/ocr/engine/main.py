"""The engine of the OCR service: one lane a model, stepped in turn."""

from collections import deque

import msgspec
import torch
from transformers.utils import logging as transformers_logging

from services.kit.engine_api import Cancelled, Failed, JobEvent, Raw
from services.ocr.domain import Decoding, EngineInfo, Line, ReadJob
from services.ocr.engine import model
from services.ocr.engine.lane import Lane
from services.ocr.settings import Settings
from services.runtimes.hardware import detect

_job_decoder = msgspec.msgpack.Decoder(ReadJob)


class OcrEngine:
    """Implements `services.kit.engine_api.Engine` for ReadJob payloads."""

    def __init__(self, lanes: dict[str, Lane]) -> None:
        self.lanes = lanes
        self._turns = deque(lanes)
        self._cancelled: list[JobEvent] = []

    def info(self) -> EngineInfo:
        """The loaded models."""
        return EngineInfo(tuple(lane.model.info for lane in self.lanes.values()))

    def submit(self, job: str, payload: Raw) -> None:
        """Take in an encoded ReadJob whose model is loaded and whose decoding is within that model's limits."""
        read = _job_decoder.decode(payload)
        self.lanes[read.model].submit(job, read)

    @torch.inference_mode()
    def cancel(self, job: str) -> None:
        """Drop a job; its rows are free at once."""
        if any(lane.cancel(job) for lane in self.lanes.values()):
            self._cancelled.append(Cancelled(job))

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._cancelled) or any(lane.busy for lane in self.lanes.values())

    @torch.inference_mode()
    def step(self) -> list[JobEvent]:
        """One encoder micro-batch or one decoding step of the next model that has work."""
        events, self._cancelled = self._cancelled, []
        for _ in range(len(self._turns)):
            self._turns.rotate(-1)
            lane = self.lanes[self._turns[-1]]
            if lane.busy:
                return events + lane.step()
        return events


def create_engine(settings_json: str) -> OcrEngine:
    """Load and warm every model of the settings; raises CheckpointError when one cannot be used."""
    settings = Settings.model_validate_json(settings_json)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    hardware = detect()
    torch.set_num_threads(settings.threads or hardware.core_count)
    lanes = {}
    for name, source in settings.models.items():
        lanes[name] = Lane(
            model=model.load(name, source, settings, hardware),
            max_rows=settings.max_rows,
            encoder_batch_size=settings.encoder_batch_size,
            encoder_step_s=settings.encoder_step_ms / 1000,
        )
    engine = OcrEngine(lanes)
    for name in lanes:
        _warm(engine, name)
    return engine


def _warm(engine: OcrEngine, name: str) -> None:
    """Read a blank line greedily and with beams: the first run of everything is slow, and broken models show."""
    line = Line(64, 16, b"\xff" * (64 * 16 * 3))
    for width in (1, 1, 4):
        decoding = Decoding(width, 1, 1.0, min(4, engine.lanes[name].model.info.max_new_token_limit))
        engine.submit("warm-up", Raw(msgspec.msgpack.encode(ReadJob(name, line, decoding, partials=False))))
        while engine.busy:
            for event in engine.step():
                if isinstance(event, Failed):
                    raise RuntimeError(f"model {name} fails on a blank line: {event.fault.message}")
