"""The blocking client."""

from collections.abc import Callable, Generator

from inkwell import types
from inkwell.calls import last
from inkwell.converters import inventory, paint
from inkwell.converters.inventory import Service
from inkwell.converters.paint import PaintOptions
from inkwell.diffusion.v1 import diffusion_pb2
from inkwell.errors import Unimplemented
from inkwell.ocr.v1 import ocr_pb2
from inkwell.reader import Reader


class Client(Reader):
    """Reads and paints through one server: a gateway, or a service itself.

    Threads may share a client. Close it, or use it in a `with` statement. Every call raises a subclass of
    `inkwell.InkwellError`; a picture given as a path raises OSError when it cannot be read.
    """

    # --- painting --------------------------------------------------------------------------------------------------

    def paint(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        model: str = "",
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        scheduler: str = "",
        seed: int | None = None,
        image_count: int | None = None,
        media_type: str = "",
        quality: int | None = None,
        previews: bool = False,
        timeout_s: float | None = None,
        on_event: Callable[[types.PaintEvent], object] | None = None,
    ) -> list[types.Picture]:
        """Paint pictures; options left out take the model's defaults, which `models` shows.

        width, height: pixels, multiples of the model's size_multiple.
        seed: 0 to 2**32 - 1, random if left out; picture i has seed + i and is the same as if asked for alone.
        media_type: "image/png" (default), "image/jpeg" or "image/webp"; quality: 1 to 100, not for PNG.
        on_event: called with every event as it comes, the result last; `previews` adds a preview after every step.
        """
        options = PaintOptions(
            prompt, negative_prompt, model, width, height, steps, guidance_scale, scheduler, seed, image_count,
            media_type, quality, previews,
        )  # fmt: skip
        result = last(self._paint_events(options, timeout_s), on_event)
        assert isinstance(result, types.PaintResult)
        return list(result.pictures)

    def paint_stream(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        model: str = "",
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        scheduler: str = "",
        seed: int | None = None,
        image_count: int | None = None,
        media_type: str = "",
        quality: int | None = None,
        previews: bool = False,
        timeout_s: float | None = None,
    ) -> Generator[types.PaintEvent, None, None]:
        """The same as events: queued, started, progress, previews, the result last. Closing it cancels the call."""
        options = PaintOptions(
            prompt, negative_prompt, model, width, height, steps, guidance_scale, scheduler, seed, image_count,
            media_type, quality, previews,
        )  # fmt: skip
        return self._paint_events(options, timeout_s)

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

    def load_model(
        self,
        name: str,
        *,
        precision: str | None = None,
        timeout_s: float | None = None,
        on_event: Callable[[types.LoadEvent], object] | None = None,
    ) -> types.OcrModel:
        """Load a model that reads and wait until it serves; at once when it does so with this precision already.

        precision: see `Precision`; the server's setting if left out. When memory is short, the models used longest ago
            are unloaded. Through a gateway, this concerns the one endpoint that it chooses.
        on_event: called with every event as it comes, the result last.
        """
        result = last(self.load_model_stream(name, precision=precision, timeout_s=timeout_s), on_event)
        assert isinstance(result, types.LoadResult)
        return result.model

    def load_model_stream(
        self, name: str, *, precision: str | None = None, timeout_s: float | None = None
    ) -> Generator[types.LoadEvent, None, None]:
        """The same as events: stages of loading, the result last."""
        request = inventory.load_request(name, precision)
        return self._stream(self._ocr.LoadModel, request, inventory.load_event, types.LoadResult, timeout_s)

    def unload_model(self, name: str, *, timeout_s: float | None = None) -> types.OcrModel:
        """Free a model's memory once the calls that use it are done. The next call that names it loads it again."""
        answer, _ = self._unary(self._ocr.UnloadModel, inventory.unload_request(name), timeout_s)
        return inventory.ocr_model(answer.model)

    def _paint_events(self, options: PaintOptions, timeout_s: float | None) -> Generator[types.PaintEvent, None, None]:
        request = paint.generate_request(options)
        method = self._diffusion.Generate
        return self._stream(method, request, paint.paint_event, types.PaintResult, timeout_s)
