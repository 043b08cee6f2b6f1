"""The continuous batch of one model: lines join and leave the rows under way at any step."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import torch
from torch import Tensor

from services.kit import faults, phases
from services.kit.engine_api import Accepted, Failed, Finished, JobEvent, Raw, Update
from services.ocr.domain import Decoding, Hypothesis, Partial, ReadJob, Recognition, Token
from services.ocr.engine import search
from services.ocr.engine.blank import is_blank
from services.ocr.engine.model import ReadingModel, Ruling
from services.ocr.engine.repetition import goes_round
from services.ocr.engine.search import Beam, Candidates, Search
from services.runtimes.sessions.interface import SessionError
from services.runtimes.trocr_rows import Rows

_encoder = msgspec.msgpack.Encoder()

# The engine hears of new calls and cancellations between steps, so a step that waits must be short.
_WAITING_STEP_S = 0.001

_NO_TOKEN_LEFT = faults.failed_precondition(
    "NO_TOKEN_LEFT", "no_repeat_ngram_size and the model's generation config together rule every token out"
)


@dataclass
class _Reading:
    """A line that is being decoded, with its image and rows in the model's `Rows`."""

    job_id: str
    decoding: Decoding  # not the job, whose pixels may go once they are encoded
    partials: bool
    search: Search
    ruling: Ruling | None
    image: int
    rows: list[int]  # by beam, best first
    last_text: str = ""
    steps: int = 0
    rows_seen: int = 0  # all rows of all its steps
    tokens_decoded: int = 0  # its own rows of all its steps


@dataclass
class _Waiting:
    job_id: str
    job: ReadJob
    accepted_s: float = 0.0  # when it was accepted

    @property
    def decoding(self) -> Decoding:
        return self.job.decoding


@dataclass
class Lane:
    """Reads lines with one model. All methods are called on one thread.

    max_rows: decoder rows that share a step. encoder_batch_size: images encoded together at most, fewer if that would
    take longer than about encoder_step_s seconds. encoder_wait_s: how long an image waits for others to be encoded
    with; the rows under way go on meanwhile. detect_blank: answer images without writing at once.
    """

    model: ReadingModel
    max_rows: int
    encoder_batch_size: int
    encoder_step_s: float
    encoder_wait_s: float = 0.0
    detect_blank: bool = True
    clock: Callable[[], float] = time.perf_counter
    _waiting: deque[_Waiting] = field(default_factory=deque, init=False)
    _accepted: deque[_Waiting] = field(default_factory=deque, init=False)
    _readings: list[_Reading] = field(default_factory=list, init=False)
    _rows: Rows = field(init=False)
    _encoder_turn: bool = field(default=True, init=False)
    _image_s: float = field(default=0.0, init=False)  # what encoding one image takes, a moving average

    def __post_init__(self) -> None:
        self._rows = Rows(self.model.networks)

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._waiting or self._accepted or self._readings)

    @property
    def rows_in_use(self) -> int:
        """Decoder rows that hold a text under way."""
        return self._rows.count

    def submit(self, job_id: str, job: ReadJob) -> None:
        """Take in a line; it waits until all rows of its beams are free."""
        self._waiting.append(_Waiting(job_id, job))

    def cancel(self, job_id: str) -> bool:
        """Drop a line and free its rows at once; False if it is not here."""
        for queue in (self._waiting, self._accepted):
            for waiting in queue:
                if waiting.job_id == job_id:
                    queue.remove(waiting)
                    return True
        for reading in self._readings:
            if reading.job_id == job_id:
                self._readings.remove(reading)
                self._rearrange([(r, r.rows) for r in self._readings])
                return True
        return False

    def step(self) -> list[JobEvent]:
        """Accept what fits, else encode a few accepted lines, else decode one token for every row; says what came."""
        accepted = self._accept()
        if accepted:
            # Told before the work begins, so that the caller sees the start when it is one.
            return accepted
        if self._awaits_company():
            if not self._readings:
                time.sleep(_WAITING_STEP_S)
                return []
        elif self._accepted and (self._encoder_turn or not self._readings):
            # Rows under way get every other step, so that a stream of newcomers does not hold them up.
            self._encoder_turn = False
            return self._encode()
        self._encoder_turn = True
        if not self._readings:
            return []
        try:
            return self._decode()
        except SessionError as error:
            lost, self._readings = self._readings, []
            self._rows.rearrange([])
            return [_lost(reading.job_id, error) for reading in lost]

    def _accept(self) -> list[JobEvent]:
        taken: list[_Waiting | _Reading] = [*self._accepted, *self._readings]
        reserved = sum(line.decoding.beam_width for line in taken)
        events: list[JobEvent] = []
        while self._waiting and reserved + self._waiting[0].decoding.beam_width <= self.max_rows:
            waiting = self._waiting.popleft()
            reserved += waiting.decoding.beam_width
            waiting.accepted_s = self.clock()
            self._accepted.append(waiting)
            phases.enter(waiting.job_id, "batch")  # it may wait for others to be encoded with
            events.append(Accepted(waiting.job_id))
        return events

    def _awaits_company(self) -> bool:
        """Whether accepted images are to wait a little for others, which must then have room."""
        if not self._accepted or self._waiting or len(self._accepted) >= self._encoder_most:
            return False
        return self.clock() - self._accepted[0].accepted_s < self.encoder_wait_s

    @property
    def _encoder_most(self) -> int:
        if not self._image_s:
            return self.encoder_batch_size
        return max(1, min(self.encoder_batch_size, int(self.encoder_step_s / self._image_s)))

    def _encode(self) -> list[JobEvent]:
        lines = [self._accepted.popleft() for _ in range(min(self._encoder_most, len(self._accepted)))]
        events: list[JobEvent] = []
        if self.detect_blank:
            taken_in, lines = lines, []
            for line in taken_in:
                if is_blank(line.job.line):
                    events.append(Finished(line.job_id, Raw(_encoder.encode(_BLANK))))
                else:
                    lines.append(line)
            if not lines:
                return events
        for line in lines:
            phases.enter(line.job_id, "encode", batch_size=len(lines))
        began = self.clock()
        first_image = self._rows.image_count
        try:
            encoded = self.model.networks.encode(self.model.prepare([line.job.line for line in lines]))
        except SessionError as error:
            return [*events, *(_lost(line.job_id, error) for line in lines)]
        rows = self._rows.join(encoded)
        taken = (self.clock() - began) / len(lines)
        self._image_s = taken if not self._image_s else 0.8 * self._image_s + 0.2 * taken
        for offset, (line, row) in enumerate(zip(lines, rows, strict=True)):
            decoding = line.decoding
            phases.enter(line.job_id, "decode", beam_width=decoding.beam_width)
            self._readings.append(
                _Reading(
                    job_id=line.job_id,
                    decoding=decoding,
                    partials=line.job.partials,
                    search=search.start(decoding, eos_ids=self.model.eos_ids),
                    ruling=self.model.ruling(decoding),
                    image=first_image + offset,
                    rows=[row],
                )
            )
        return events

    def _decode(self) -> list[JobEvent]:
        tokens = [0] * self._rows.count
        for reading in self._readings:
            for row, beam in zip(reading.rows, reading.search.beams, strict=True):
                tokens[row] = beam.ids[-1] if beam.ids else self.model.start_id
        row_count = len(tokens)
        scores = _Scores(self._rows.step(tokens), self._readings)

        events: list[JobEvent] = []
        going_on: list[tuple[_Reading, list[int]]] = []
        for reading in self._readings:
            reading.steps += 1
            reading.rows_seen += row_count
            phases.step(reading.job_id, batch_size=row_count)
            reading.tokens_decoded += len(reading.rows)
            candidates = scores.of(reading, self.model.start_id)
            if not all(math.isfinite(row.log_probabilities[0]) for row in candidates):
                fault = faults.internal("the model's scores are not finite numbers; its weights or data type are unfit")
                events.append(Failed(reading.job_id, fault.data))
                continue
            parents = reading.search.advance(candidates)
            if parents:
                going_on.append((reading, [reading.rows[parent] for parent in parents]))
                events += self._partial(reading)
            elif not reading.search.results():
                events.append(Failed(reading.job_id, _NO_TOKEN_LEFT.data))
            else:
                events.append(Finished(reading.job_id, Raw(_encoder.encode(self._recognition(reading)))))
        self._rearrange(going_on)
        return events

    def _rearrange(self, going_on: list[tuple[_Reading, list[int]]]) -> None:
        seats = self._rows.rearrange([(reading.image, sources) for reading, sources in going_on])
        for (reading, _), (image, rows) in zip(going_on, seats, strict=True):
            reading.image, reading.rows = image, rows
        self._readings = [reading for reading, _ in going_on]

    def _partial(self, reading: _Reading) -> list[JobEvent]:
        if not reading.partials:
            return []
        ids = reading.search.beams[0].ids
        # A character that several tokens make up shows as U+FFFD until its last one is there.
        text = self.model.text(ids).rstrip("\ufffd")
        if text == reading.last_text:
            return []
        reading.last_text = text
        return [Update(reading.job_id, Raw(_encoder.encode(Partial(text, len(ids)))))]

    def _recognition(self, reading: _Reading) -> Recognition:
        decoding = reading.decoding
        results = reading.search.results()[: decoding.hypothesis_count]
        best = results[0][0]
        hypotheses = tuple(self._hypothesis(beam, score) for beam, score in results)
        confidence, calibration = hypotheses[0].confidence, self.model.calibration
        forced_end = self.model.generation.forced_eos_token_id is not None
        at_limit = len(best.ids) >= decoding.max_new_token_count
        return Recognition(
            hypotheses=hypotheses,
            truncated=at_limit and (forced_end or best.ids[-1] not in self.model.eos_ids),
            decoded_token_count=reading.tokens_decoded,
            mean_batch_rows=reading.rows_seen / reading.steps,
            confidence=calibration.expected(confidence, decoding.beam_width) if calibration else confidence,
            confidence_calibrated=calibration is not None,
            repetition_suspected=goes_round(hypotheses[0].text),
            blank=False,
        )

    def _hypothesis(self, beam: Beam, score: float) -> Hypothesis:
        total = math.fsum(beam.log_probabilities)
        pieces = self.model.pieces(beam.ids)
        return Hypothesis(
            text=self.model.text(beam.ids),
            log_probability=total,
            score=score,
            confidence=math.exp(total / len(beam.ids)),
            tokens=tuple(map(Token, beam.ids, pieces, beam.log_probabilities)),
        )


def _lost(job_id: str, error: SessionError) -> Failed:
    """A compiled model failed, as one does that a remote server runs: those in it end, the service goes on."""
    fault = faults.unavailable("RUNTIME_FAILED", f"the model's runtime failed: {error}", retry_after_ms=1000)
    return Failed(job_id, fault.data)


# The reading of nothing: no token, so no probability but 1, and no calibration that could speak for it.
_BLANK = Recognition(
    hypotheses=(Hypothesis(text="", log_probability=0.0, score=0.0, confidence=1.0, tokens=()),),
    truncated=False,
    decoded_token_count=0,
    mean_batch_rows=0.0,
    confidence=1.0,
    confidence_calibrated=False,
    repetition_suspected=False,
    blank=True,
)


class _Scores:
    """One step's scores as each search wants them: by the best few tokens of its rows."""

    def __init__(self, logits: Tensor, readings: list[_Reading]) -> None:
        """logits: float32 [rows, vocabulary]."""
        self._logits = logits
        self._log_probabilities = torch.log_softmax(logits, dim=-1)
        free = [reading.search.candidate_count for reading in readings if reading.ruling is None]
        if free:
            # One sort and one transfer to the host for all rows.
            best = self._log_probabilities.topk(min(max(free), logits.shape[1]), dim=-1)
            self._ids, self._values = best.indices.tolist(), best.values.tolist()

    def of(self, reading: _Reading, start_id: int) -> list[Candidates]:
        """Candidates for each row of the line, best beam first."""
        most = reading.search.candidate_count
        if reading.ruling is not None:
            return self._ruled(reading, reading.ruling, most, start_id)
        values = self._values
        return [Candidates(self._ids[row][:most], values[row][:most], values[row][:most]) for row in reading.rows]

    def _ruled(self, reading: _Reading, ruling: Ruling, most: int, start_id: int) -> list[Candidates]:
        own = self._log_probabilities[reading.rows]
        # The library rules on logits in greedy search and on log-probabilities in beam search.
        ranked = self._logits[reading.rows] if most == 1 else own
        so_far = torch.tensor([(start_id, *beam.ids) for beam in reading.search.beams], device=ranked.device)
        best = ruling(so_far, ranked.clone()).topk(min(most, ranked.shape[1]), dim=-1)
        log_probabilities = own.gather(1, best.indices)
        scores = best.values
        if most == 1:
            scores = log_probabilities.masked_fill(best.values == -math.inf, -math.inf)
        return [
            Candidates(*row)
            for row in zip(best.indices.tolist(), scores.tolist(), log_probabilities.tolist(), strict=True)
        ]
