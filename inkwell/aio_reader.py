"""Reading with the client for asyncio: lines, documents, embeddings."""

from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable

from inkwell import types
from inkwell.aio_calls import AsyncCalls, last, load_async
from inkwell.batch import BatchBook, BatchItem, Outcome
from inkwell.channel import ENVELOPE_BYTES, REQUEST_BYTES_MOST
from inkwell.converters import read
from inkwell.converters.document import DocumentAssembler, DocumentOptions, document_request
from inkwell.converters.embed import embed_request, embeddings
from inkwell.converters.read import ReadOptions
from inkwell.converters.shared import several
from inkwell.ocr.v1 import ocr_pb2, ocr_pb2_grpc

_MOST = REQUEST_BYTES_MOST - ENVELOPE_BYTES


class AsyncReader(AsyncCalls):
    """The calls of `inkwell.AsyncClient` that read; see `Client` for each."""

    async def read(
        self,
        image: types.ImageSource,
        *,
        model: str = "",
        languages: str | Iterable[str] = (),
        beam_width: int | None = None,
        hypothesis_count: int | None = None,
        length_penalty: float | None = None,
        max_new_token_count: int | None = None,
        no_repeat_ngram_size: int | None = None,
        early_stopping: str | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
        on_event: Callable[[types.ReadEvent], object] | None = None,
    ) -> types.Reading:
        """Read one line of handwriting; see `Client.read`."""
        options = ReadOptions(
            model, beam_width, hypothesis_count, length_penalty, max_new_token_count, no_repeat_ngram_size,
            early_stopping, several("languages", languages),
        )  # fmt: skip
        if on_event is None:
            request = read.recognize_request(await load_async(image, most=_MOST), options)
            answer, served = await self._unary(self._ocr().Recognize, request, timeout_s, request_id)
            return read.reading(answer.recognition, served)
        result = await last(self._read_events(image, options, timeout_s, request_id), on_event)
        assert isinstance(result, types.ReadResult)
        return result.reading

    def read_stream(
        self,
        image: types.ImageSource,
        *,
        model: str = "",
        languages: str | Iterable[str] = (),
        beam_width: int | None = None,
        hypothesis_count: int | None = None,
        length_penalty: float | None = None,
        max_new_token_count: int | None = None,
        no_repeat_ngram_size: int | None = None,
        early_stopping: str | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> AsyncGenerator[types.ReadEvent, None]:
        """The same as events, the result last; see `Client.read_stream`."""
        options = ReadOptions(
            model, beam_width, hypothesis_count, length_penalty, max_new_token_count, no_repeat_ngram_size,
            early_stopping, several("languages", languages),
        )  # fmt: skip
        return self._read_events(image, options, timeout_s, request_id)

    def read_many(
        self,
        images: Iterable[BatchItem] | AsyncIterable[BatchItem],
        *,
        model: str = "",
        languages: str | Iterable[str] = (),
        beam_width: int | None = None,
        hypothesis_count: int | None = None,
        length_penalty: float | None = None,
        max_new_token_count: int | None = None,
        no_repeat_ngram_size: int | None = None,
        early_stopping: str | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Outcome, None]:
        """Read many lines over one stream, yielding as they are ready; see `Client.read_many`."""
        options = ReadOptions(
            model, beam_width, hypothesis_count, length_penalty, max_new_token_count, no_repeat_ngram_size,
            early_stopping, several("languages", languages),
        )  # fmt: skip
        return self._batch(images, BatchBook(options), timeout_s)

    async def read_document(
        self,
        document: types.ImageSource,
        *,
        pages: str | Iterable[int] | None = None,
        dpi: int | None = None,
        min_confidence: float | None = None,
        orientation: int | None = None,
        export: str | Iterable[str] = (),
        model: str = "",
        languages: str | Iterable[str] = (),
        beam_width: int | None = None,
        hypothesis_count: int | None = None,
        length_penalty: float | None = None,
        max_new_token_count: int | None = None,
        no_repeat_ngram_size: int | None = None,
        early_stopping: str | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
        on_event: Callable[[types.DocumentEvent], object] | None = None,
    ) -> types.Document:
        """Read a document: find the lines of its pages and read them; see `Client.read_document`."""
        options = ReadOptions(
            model, beam_width, hypothesis_count, length_penalty, max_new_token_count, no_repeat_ngram_size,
            early_stopping, several("languages", languages),
        )  # fmt: skip
        request = document_request(DocumentOptions(options, pages, dpi, min_confidence, orientation, export))
        result = await last(self._document_events(document, request, timeout_s, request_id), on_event)
        assert isinstance(result, types.DocumentResult)
        return result.document

    def read_document_stream(
        self,
        document: types.ImageSource,
        *,
        pages: str | Iterable[int] | None = None,
        dpi: int | None = None,
        min_confidence: float | None = None,
        orientation: int | None = None,
        export: str | Iterable[str] = (),
        model: str = "",
        languages: str | Iterable[str] = (),
        beam_width: int | None = None,
        hypothesis_count: int | None = None,
        length_penalty: float | None = None,
        max_new_token_count: int | None = None,
        no_repeat_ngram_size: int | None = None,
        early_stopping: str | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> AsyncGenerator[types.DocumentEvent, None]:
        """The same as events, the result last; see `Client.read_document_stream`."""
        options = ReadOptions(
            model, beam_width, hypothesis_count, length_penalty, max_new_token_count, no_repeat_ngram_size,
            early_stopping, several("languages", languages),
        )  # fmt: skip
        request = document_request(DocumentOptions(options, pages, dpi, min_confidence, orientation, export))
        return self._document_events(document, request, timeout_s, request_id)

    async def embed(
        self,
        images: types.ImageSource | Iterable[types.ImageSource],
        *,
        model: str = "",
        pooling: str = "mean",
        dtype: str = "float32",
        normalize: bool = False,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> types.Embeddings:
        """The encoder's hidden states of pictures of one line each; see `Client.embed`."""
        contents = [await load_async(image, most=_MOST) for image in read.each_of(images)]
        request = embed_request(contents, model=model, pooling=pooling, dtype=dtype, normalize=normalize)
        answer, served = await self._unary(self._ocr().Embed, request, timeout_s, request_id)
        return embeddings(answer, served)

    def _ocr(self) -> ocr_pb2_grpc.OcrServiceStub:
        return ocr_pb2_grpc.OcrServiceStub(self._channel())

    def _read_events(
        self, image: types.ImageSource, options: ReadOptions, timeout_s: float | None, request_id: str | None
    ) -> AsyncGenerator[types.ReadEvent, None]:
        async def request() -> ocr_pb2.StreamRecognizeRequest:
            return read.stream_recognize_request(await load_async(image, most=_MOST), options)

        def start(ready: ocr_pb2.StreamRecognizeRequest) -> AsyncGenerator[types.ReadEvent, None]:
            method = self._ocr().StreamRecognize
            return self._stream(method, ready, read.read_event, types.ReadResult, timeout_s, request_id)

        return self._later(request, start)

    def _document_events(
        self,
        source: types.ImageSource,
        request: ocr_pb2.ReadDocumentRequest,
        timeout_s: float | None,
        request_id: str | None,
    ) -> AsyncGenerator[types.DocumentEvent, None]:
        async def complete() -> ocr_pb2.ReadDocumentRequest:
            request.content = await load_async(source, field="content", most=_MOST)
            return request

        def start(ready: ocr_pb2.ReadDocumentRequest) -> AsyncGenerator[types.DocumentEvent, None]:
            convert = DocumentAssembler().event
            return self._stream(self._ocr().ReadDocument, ready, convert, types.DocumentResult, timeout_s, request_id)

        return self._later(complete, start)
