"""The blocking client."""

from collections.abc import Callable, Generator
from typing import Any, Literal, Unpack, overload

from google.longrunning import operations_pb2

from inkwell import types
from inkwell.calls import last
from inkwell.compiling import Compiling
from inkwell.converters import inventory, paint
from inkwell.converters.asking import NOBODY_LOOKS_MS, attach, generate_request
from inkwell.converters.inventory import Service
from inkwell.diffusion.v1 import diffusion_pb2
from inkwell.errors import Unimplemented
from inkwell.longrunning import list_request
from inkwell.ocr.v1 import ocr_pb2
from inkwell.operation import Operation
from inkwell.reader import Reader


class Client(Reader, Compiling):
    """Reads and paints through one server: a gateway, or a service itself.

    Threads may share a client. Close it, or use it in a `with` statement. Every call raises a subclass of
    `inkwell.InkwellError`; a picture given as a path raises OSError when it cannot be read.
    """

    # --- painting --------------------------------------------------------------------------------------------------

    def paint(
        self,
        prompt: str,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        on_event: Callable[[types.PaintEvent], object] | None = None,
        **options: Unpack[types.PaintOptions],
    ) -> list[types.Picture]:
        """Paint pictures; options left out take the model's defaults, which `models` shows.

        options: see `PaintOptions`, such as `seed=7`, `steps=30`, `image="photo.png"` or `loras=["fluent"]`.
        request_id: see `read`. on_event: called with every event as it comes, the result last.
        """
        if on_event is None and options.get("progress_interval_ms") is None:
            options["progress_interval_ms"] = NOBODY_LOOKS_MS
        result = last(self.paint_stream(prompt, timeout_s=timeout_s, request_id=request_id, **options), on_event)
        assert isinstance(result, types.PaintResult)
        return list(result.pictures)

    def paint_stream(
        self,
        prompt: str,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **options: Unpack[types.PaintOptions],
    ) -> Generator[types.PaintEvent, None, None]:
        """The same as events: queued, started, progress, previews, the result last. Closing it cancels the call."""
        request, attachments = generate_request(prompt, options)
        attach(attachments)
        return self._stream(
            self._diffusion.Generate, request, paint.paint_event, types.PaintResult, timeout_s, request_id
        )

    # --- what there is ---------------------------------------------------------------------------------------------

    def models(self, service: Service | None = None, *, timeout_s: float | None = None) -> list[types.Model]:
        """The models of one service, or of every service that the server offers."""
        if service == "ocr":
            answer, _ = self._unary(self._ocr.ListModels, ocr_pb2.ListModelsRequest(), timeout_s)
            return list(inventory.ocr_models(answer))
        if service == "diffusion":
            answer, _ = self._unary(self._diffusion.ListModels, diffusion_pb2.ListModelsRequest(), timeout_s)
            return list(inventory.diffusion_models(answer))
        try:
            readers = self.models("ocr", timeout_s=timeout_s)
        except Unimplemented:
            return self.models("diffusion", timeout_s=timeout_s)
        try:
            return readers + self.models("diffusion", timeout_s=timeout_s)
        except Unimplemented:
            return readers

    def schedulers(self, *, timeout_s: float | None = None) -> list[types.Scheduler]:
        """The schedulers that `paint` knows by name."""
        request = diffusion_pb2.ListSchedulersRequest()
        answer, _ = self._unary(self._diffusion.ListSchedulers, request, timeout_s)
        return inventory.schedulers(answer)

    def fleet(self, *, service: str = "", hardware: str = "", timeout_s: float | None = None) -> list[types.Pool]:
        """The pools behind a gateway, with the state and load of their endpoints; empty strings for all."""
        request = inventory.list_pools_request(service, hardware)
        answer, _ = self._unary(self._gateway.ListPools, request, timeout_s)
        return inventory.pools(answer)

    def adapters(self, *, timeout_s: float | None = None) -> list[types.Adapter]:
        """The LoRAs, textual inversion embeddings and image prompt adapters that `paint` knows by name."""
        answer, _ = self._unary(self._diffusion.ListAdapters, diffusion_pb2.ListAdaptersRequest(), timeout_s)
        return inventory.adapters(answer)

    def controls(self, *, timeout_s: float | None = None) -> types.Controls:
        """The models that steer a composition, and the preprocessors that make conditions, that `paint` knows."""
        answer, _ = self._unary(self._diffusion.ListControls, diffusion_pb2.ListControlsRequest(), timeout_s)
        return inventory.controls(answer)

    @overload
    def load_model(
        self,
        name: str,
        *,
        service: Literal["ocr"] = "ocr",
        precision: str | None = None,
        artifact: str = "",
        runtime: str = "",
        timeout_s: float | None = None,
        on_event: Callable[[types.LoadEvent], object] | None = None,
    ) -> types.OcrModel: ...

    @overload
    def load_model(
        self,
        name: str,
        *,
        service: Literal["diffusion"],
        artifact: str = "",
        runtime: str = "",
        timeout_s: float | None = None,
        on_event: Callable[[types.LoadEvent], object] | None = None,
    ) -> types.DiffusionModel: ...

    def load_model(
        self,
        name: str,
        *,
        service: Service = "ocr",
        precision: str | None = None,
        artifact: str = "",
        runtime: str = "",
        timeout_s: float | None = None,
        on_event: Callable[[types.LoadEvent], object] | None = None,
    ) -> types.Model:
        """Load a model and wait until it serves; at once when it does so already.

        service: "ocr" for a model that reads, "diffusion" for one that paints.
        precision: of a model that reads, see `Precision`; the server's setting if left out. When memory is short, the
            models used longest ago are unloaded. Through a gateway, this concerns the one endpoint that it chooses.
        artifact: id, or its first digits, of the compiled model to run from; what the server chooses if left out.
        runtime: "torch", "onnxruntime", "openvino", "tensorrt" or "triton"; the server's setting if left out.
        on_event: called with every event as it comes, the result last.
        """
        events = self.load_model_stream(
            name, service=service, precision=precision, artifact=artifact, runtime=runtime, timeout_s=timeout_s
        )
        result = last(events, on_event)
        assert isinstance(result, types.LoadResult)
        return result.model

    def load_model_stream(
        self,
        name: str,
        *,
        service: Service = "ocr",
        precision: str | None = None,
        artifact: str = "",
        runtime: str = "",
        timeout_s: float | None = None,
    ) -> Generator[types.LoadEvent, None, None]:
        """The same as events: stages of loading, the result last."""
        request = inventory.load_request(name, service, precision=precision, artifact=artifact, runtime=runtime)
        method = self._diffusion.LoadModel if service == "diffusion" else self._ocr.LoadModel
        return self._stream(method, request, inventory.load_event, types.LoadResult, timeout_s)

    @overload
    def unload_model(
        self, name: str, *, service: Literal["ocr"] = "ocr", timeout_s: float | None = None
    ) -> types.OcrModel: ...

    @overload
    def unload_model(
        self, name: str, *, service: Literal["diffusion"], timeout_s: float | None = None
    ) -> types.DiffusionModel: ...

    def unload_model(self, name: str, *, service: Service = "ocr", timeout_s: float | None = None) -> types.Model:
        """Free a model's memory once the calls that use it are done. The next call that names it loads it again."""
        request = inventory.unload_request(name, service)
        method = self._diffusion.UnloadModel if service == "diffusion" else self._ocr.UnloadModel
        answer, _ = self._unary(method, request, timeout_s)
        return inventory.model(answer.model)

    # --- operations ------------------------------------------------------------------------------------------------

    def operation(self, name: str, *, timeout_s: float | None = None) -> Operation[Any]:
        """An operation by its name, such as "operations/compiler/6f1c…"; raises NotFound."""
        request = operations_pb2.GetOperationRequest(name=name)
        answer, _ = self._unary(self._operations.GetOperation, request, timeout_s)
        return Operation(self, answer)

    def operations(
        self, service: str = "compiler", *, done: bool | None = None, timeout_s: float | None = None
    ) -> list[Operation[Any]]:
        """The operations of a service, newest first. done: only those that are, or are not, done; None for all."""
        found: list[Operation[Any]] = []
        page_token = ""
        while True:
            request = list_request(service, done, page_token)
            answer, _ = self._unary(self._operations.ListOperations, request, timeout_s)
            found += [Operation(self, message) for message in answer.operations]
            page_token = answer.next_page_token
            if not page_token:
                return found
