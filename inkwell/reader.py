"""Reading with the blocking client: lines, documents, embeddings."""

from collections.abc import Callable, Generator, Iterable

from inkwell import types
from inkwell.batch import BatchBook, BatchItem, Outcome
from inkwell.calls import Calls, last
from inkwell.channel import ENVELOPE_BYTES, REQUEST_BYTES_MOST
from inkwell.converters import read
from inkwell.converters.document import DocumentAssembler, DocumentOptions, document_request
from inkwell.converters.embed import embed_request, embeddings
from inkwell.converters.read import ReadOptions
from inkwell.converters.shared import several
from inkwell.files import load
from inkwell.ocr.v1 import ocr_pb2

_MOST = REQUEST_BYTES_MOST - ENVELOPE_BYTES


class Reader(Calls):
    """The calls of `inkwell.Client` that read."""

    def read(
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
        """Read one line of handwriting; options left out take the model's defaults, which `models` shows.

        image: bytes of a PNG, JPEG, WebP, TIFF or BMP file, or its path.
        languages: BCP 47 tags such as "fr", most likely first; without `model` the first that a model declares
            chooses it.
        beam_width: rows searched at once, 1 (greedy) to 16; hypothesis_count: how many to return, 1 to beam_width.
        length_penalty: -5 to 5, above 0 favours longer text; beam search only.
        no_repeat_ngram_size: no run of so many tokens comes twice, 0 to 64; 0 allows all repetition.
        early_stopping: "first", "heuristic" or "never"; see `EarlyStopping`.
        request_id: a UUID that this call shares with an earlier one that asked the same: nothing is computed that is
            under way, or was answered a short while ago, under that id. One of its own if left out.
        on_event: called with every event as it comes, the result last.
        """
        options = ReadOptions(
            model, beam_width, hypothesis_count, length_penalty, max_new_token_count, no_repeat_ngram_size,
            early_stopping, several("languages", languages),
        )  # fmt: skip
        content = load(image, most=_MOST)
        if on_event is None:
            request = read.recognize_request(content, options)
            answer, served = self._unary(self._ocr.Recognize, request, timeout_s, request_id)
            return read.reading(answer.recognition, served)
        result = last(self._read_events(content, options, timeout_s, request_id), on_event)
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
    ) -> Generator[types.ReadEvent, None, None]:
        """The same as events: queued, started, partial text, the result last. Closing it cancels the call."""
        options = ReadOptions(
            model, beam_width, hypothesis_count, length_penalty, max_new_token_count, no_repeat_ngram_size,
            early_stopping, several("languages", languages),
        )  # fmt: skip
        return self._read_events(load(image, most=_MOST), options, timeout_s, request_id)

    def read_many(
        self,
        images: Iterable[BatchItem],
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
    ) -> Generator[Outcome, None, None]:
        """Read many lines over one stream; yields (id, Reading) or (id, InkwellError), as they are ready.

        images: pictures, or (id, picture) pairs. The id of a picture without one is its path, or its position from 0
            if it came as bytes. `images` is iterated in another thread, only as far as answers are taken: at most 16
            pictures are under way. One that cannot be read fails alone.
        timeout_s: for the whole stream; None for ever.
        """
        options = ReadOptions(
            model, beam_width, hypothesis_count, length_penalty, max_new_token_count, no_repeat_ngram_size,
            early_stopping, several("languages", languages),
        )  # fmt: skip
        return self._batch(iter(images), BatchBook(options), timeout_s)

    def read_document(
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
        """Read a document: find the lines of its pages and read them in order.

        document: bytes of a PDF, of a TIFF (all its pages) or of one image, or its path.
        pages: such as "1-3,7,9-", from 1, or numbers; read in this order. All of them if left out.
        dpi: dots per inch that PDF pages are rendered at, 72 to 600; 200 if left out. Images have their own pixels.
        min_confidence: lines of less are left out, 0 to 1.
        orientation: how far the pages must be turned clockwise to be upright: 0, 90, 180 or 270 degrees; found out
            page by page if left out.
        export: files wanted: "text", "json", "hocr", "alto", "page-xml" (a ZIP archive for several pages), "pdf" (the
            pages with the text lying invisibly over the writing); they are in the result's `exports`.
        on_event: called with every event as it comes, the result last.
        The other options are those of `read`, for every line. The document's time is `timeout_s`, all pages together.
        """
        options = ReadOptions(
            model, beam_width, hypothesis_count, length_penalty, max_new_token_count, no_repeat_ngram_size,
            early_stopping, several("languages", languages),
        )  # fmt: skip
        request = document_request(DocumentOptions(options, pages, dpi, min_confidence, orientation, export))
        result = last(self._document_events(document, request, timeout_s, request_id), on_event)
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
    ) -> Generator[types.DocumentEvent, None, None]:
        """The same as events: queued, started, progress, pages begun, lines read, pages read, files, the result last.

        Closing it cancels the call.
        """
        options = ReadOptions(
            model, beam_width, hypothesis_count, length_penalty, max_new_token_count, no_repeat_ngram_size,
            early_stopping, several("languages", languages),
        )  # fmt: skip
        request = document_request(DocumentOptions(options, pages, dpi, min_confidence, orientation, export))
        return self._document_events(document, request, timeout_s, request_id)

    def embed(
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
        """The encoder's hidden states of pictures of one line each, in the order given.

        images: one picture or several, each as in `read`; all travel in one request.
        pooling: "mean" over all tokens, "cls" for the first token, "none" for all of them.
        request_id: see `read`. dtype: "float32" or "float16". normalize: scale each vector to length 1 (L2).
        """
        contents = [load(image, most=_MOST) for image in read.each_of(images)]
        request = embed_request(contents, model=model, pooling=pooling, dtype=dtype, normalize=normalize)
        answer, served = self._unary(self._ocr.Embed, request, timeout_s, request_id)
        return embeddings(answer, served)

    def _read_events(
        self, content: bytes, options: ReadOptions, timeout_s: float | None, request_id: str | None
    ) -> Generator[types.ReadEvent, None, None]:
        request = read.stream_recognize_request(content, options)
        method = self._ocr.StreamRecognize
        return self._stream(method, request, read.read_event, types.ReadResult, timeout_s, request_id)

    def _document_events(
        self,
        source: types.ImageSource,
        request: ocr_pb2.ReadDocumentRequest,
        timeout_s: float | None,
        request_id: str | None,
    ) -> Generator[types.DocumentEvent, None, None]:
        request.content = load(source, field="content", most=_MOST)
        convert = DocumentAssembler().event
        return self._stream(self._ocr.ReadDocument, request, convert, types.DocumentResult, timeout_s, request_id)
