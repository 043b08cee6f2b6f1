"""The part of the fake OCR service that reads documents, embeds pictures and loads models.

A document is UTF-8 text: a line a line, an empty line between blocks, a form feed between pages, and after it what
happens: b"hold" waits when its first page is read, b"bad" is refused, b"gap", b"lost page", b"cut export" and
b"mixed exports" end in streams that do not add up. A line of "?" is read with little confidence.
"""

import struct
from collections.abc import Iterator
from typing import Any

from inkwell.common.v1 import common_pb2
from inkwell.ocr.v1 import ocr_pb2, ocr_pb2_grpc
from services.kit import faults

Response = ocr_pb2.ReadDocumentResponse
WIDTH = 4
TOKENS = 3


class DocumentServicer(ocr_pb2_grpc.OcrServiceServicer):
    """Needs `_server`, the InkwellServer."""

    _server: Any

    def ReadDocument(self, request: Any, context: Any) -> Iterator[Any]:
        self._server.admit(request, context)
        if request.content == b"bad":
            self._server.refuse(context, faults.invalid_field("content", "no PDF, TIFF or image", reason="BAD_FILE"))
        sequence = 0
        for event in self._events(request, context):
            sequence += 1 + (request.content == b"gap" and sequence == 3)
            event.sequence = sequence
            yield event

    def _events(self, request: Any, context: Any) -> Iterator[Any]:
        pages = request.content.decode().split("\f")
        wanted = [
            number
            for each in request.page_ranges
            for number in range(each.first_page, (each.last_page or len(pages)) + 1)
        ] or range(1, len(pages) + 1)
        lines: dict[int, list[Any]] = {number: list(found(pages[number - 1])) for number in wanted}
        kept: dict[int, list[Any]] = {}
        count = sum(len(each) for each in lines.values())
        done = 0
        yield Response(queued=common_pb2.Queued(position=1))
        yield Response(started=common_pb2.Started(hardware="cpu", runtime="torch", model="pen"))
        for place, number in enumerate(wanted):
            page = ocr_pb2.DocumentPage(
                page=number, width=800, height=600, dpi=request.dpi or 200, rotation=90, skew=1.5,
                line_count=len(lines[number]),
            )  # fmt: skip
            yield Response(page_started=page)
            for line in reversed(lines[number]):
                done += 1
                yield Response(line=ocr_pb2.LineRead(page=number, line=line))
                progress = ocr_pb2.DocumentProgress(
                    page_done_count=place, page_count=len(wanted), line_done_count=done, line_count=count,
                    eta_ms=1000 * (count - done),
                )  # fmt: skip
                yield Response(progress=progress)
            kept[number] = [each for each in lines[number] if each.recognition.confidence >= request.min_confidence]
            if request.content != b"lost page":
                bare = [without_tokens(each) for each in kept[number]]
                yield Response(page=ocr_pb2.PageRead(page=page, lines=bare))
            yield Response()  # an event of a later version
            if request.content.startswith(b"hold"):
                self._server.hold(context)
        for kind in request.export_formats:
            yield from self._export(kind, request)
        text_count = sum(len(each) for each in kept.values())
        timing = common_pb2.Timing(queue_ms=1, engine_ms=500)
        if not self._server.end_without_result:
            yield Response(
                result=ocr_pb2.DocumentResult(
                    page_count=len(wanted), line_count=text_count, dropped_line_count=count - text_count,
                    blank_line_count=2, confidence=0.5, timing=timing,
                )
            )  # fmt: skip

    def _export(self, kind: Any, request: Any) -> Iterator[Any]:
        name = ocr_pb2.ExportFormat.Name(kind)
        content = f"<{name}> of {request.content.decode()}".encode()
        archive = kind == ocr_pb2.EXPORT_FORMAT_PAGE_XML and b"\f" in request.content
        media_type = "application/zip" if archive else "text/fake"
        for start in range(0, len(content), 7):
            last = start + 7 >= len(content) and request.content != b"cut export"
            chunk = ocr_pb2.ExportChunk(
                format=kind, media_type=media_type, content=content[start : start + 7], is_last=last
            )
            if request.content == b"mixed exports" and start:
                chunk.format = ocr_pb2.EXPORT_FORMAT_JSON
            yield Response(export=chunk)

    def Embed(self, request: Any, context: Any) -> Any:
        self._server.admit(request, context)
        for number, image in enumerate(request.images):
            if image.content == b"bad":
                fault = faults.invalid_field(f"images[{number}].content", "not a picture", reason="BAD_IMAGE")
                self._server.refuse(context, fault)
        whole = request.pooling == ocr_pb2.POOLING_NONE
        shape = [len(request.images), TOKENS, WIDTH] if whole else [len(request.images), WIDTH]
        half = request.dtype == common_pb2.TENSOR_TYPE_FLOAT16
        numbers = [
            len(image.content) + place / 4
            for image in request.images
            for place in range(WIDTH * (TOKENS if whole else 1))
        ]
        content = struct.pack(f"<{len(numbers)}{'e' if half else 'f'}", *numbers)
        if request.model == "torn":
            content = content[:-1]
        tensor = common_pb2.Tensor(content=content, dtype=request.dtype or common_pb2.TENSOR_TYPE_FLOAT32, shape=shape)
        return ocr_pb2.EmbedResponse(
            embeddings=tensor, model="pen", timing=common_pb2.Timing(queue_ms=0.5, engine_ms=2)
        )

    def LoadModel(self, request: Any, context: Any) -> Iterator[Any]:
        self._server.admit(request, context)
        self._know(request.name, context)
        progress = ocr_pb2.LoadProgress
        yield ocr_pb2.LoadModelResponse(sequence=1, progress=progress(stage=ocr_pb2.LOAD_STAGE_WAITING))
        yield ocr_pb2.LoadModelResponse(
            sequence=2, progress=progress(stage=ocr_pb2.LOAD_STAGE_READING_WEIGHTS, evicted_models=["old", "older"])
        )
        yield ocr_pb2.LoadModelResponse(sequence=3)  # an event of a later version
        if request.name == "hold":
            self._server.hold(context)
        yield ocr_pb2.LoadModelResponse(sequence=4, progress=progress(stage=ocr_pb2.LOAD_STAGE_WARMING))
        if not self._server.end_without_result:
            model = pen()
            model.name = request.name
            model.precision = request.precision or ocr_pb2.PRECISION_FLOAT32
            model.runtime, model.artifact = request.runtime or "torch", request.artifact
            yield ocr_pb2.LoadModelResponse(sequence=5, result=ocr_pb2.LoadResult(model=model, elapsed_ms=1234))

    def UnloadModel(self, request: Any, context: Any) -> Any:
        self._server.admit(request, context)
        self._know(request.name, context)
        model = pen()
        model.name = request.name
        model.state = common_pb2.MODEL_STATE_UNLOADED
        model.ClearField("precision")
        return ocr_pb2.UnloadModelResponse(model=model)

    def _know(self, name: str, context: Any) -> None:
        known = (self._server.reader, "hold")
        if name not in known:
            self._server.refuse(context, faults.not_found("model", name, known, field="name"))


def pen(name: str = "pen") -> ocr_pb2.Model:
    return ocr_pb2.Model(
        name=name, state=common_pb2.MODEL_STATE_READY, hardware="cpu", runtime="torch", dtype="float32",
        parameter_count=7_000_000, max_new_token_limit=128, is_default=True,
        default_decoding=ocr_pb2.DecodingOptions(
            beam_width=4, hypothesis_count=1, length_penalty=1, max_new_token_count=64, no_repeat_ngram_size=0,
            early_stopping=ocr_pb2.EARLY_STOPPING_NEVER,
        ),
        precision=ocr_pb2.PRECISION_INT8_DYNAMIC, weight_bytes=7_500_000, languages=["en", "de"],
        confidence_calibrated=True, embedding_width=192,
    )  # fmt: skip


def found(page: str) -> Iterator[Any]:
    """The lines of one page; the first has a token a character."""
    order = 0
    for block, text in enumerate(filter(None, page.split("\n\n")), start=1):
        for line in text.splitlines():
            order += 1
            tokens = [ocr_pb2.Token(id=place, text=each) for place, each in enumerate(line)]
            confidence = 0.125 if line == "?" else 0.75
            recognition = ocr_pb2.Recognition(
                hypotheses=[ocr_pb2.Hypothesis(text=line, confidence=0.5, tokens=tokens)],
                model="pen", confidence=confidence, confidence_calibrated=True,
            )  # fmt: skip
            corners = [(10, order * 40), (400, order * 40), (400, order * 40 + 30.5), (10, order * 40 + 30.5)]
            yield ocr_pb2.DocumentLine(
                order=order, block=block, polygon=[ocr_pb2.Point(x=x, y=y) for x, y in corners], angle=-1.5,
                detection_score=0.875, recognition=recognition,
            )  # fmt: skip


def without_tokens(line: Any) -> Any:
    """As a page's lines come."""
    bare = ocr_pb2.DocumentLine()
    bare.CopyFrom(line)
    for hypothesis in bare.recognition.hypotheses:
        del hypothesis.tokens[:]
    return bare
