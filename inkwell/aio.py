"""The client for asyncio: the same calls as `inkwell.Client`, to be awaited or iterated with `async for`."""

from collections.abc import AsyncGenerator, Callable

from inkwell import types
from inkwell.aio_calls import last
from inkwell.aio_reader import AsyncReader
from inkwell.converters import inventory, paint
from inkwell.converters.inventory import Service
from inkwell.converters.paint import PaintOptions
from inkwell.diffusion.v1 import diffusion_pb2, diffusion_pb2_grpc
from inkwell.errors import Unimplemented
from inkwell.gateway.v1 import gateway_pb2_grpc
from inkwell.ocr.v1 import ocr_pb2


class AsyncClient(AsyncReader):
    """Reads and paints through one server, on one event loop.

    Arguments, results and errors are those of `inkwell.Client`. Cancelling the task that awaits a call, or closing
    (`aclose`) the iterator of one, cancels it at the server.
    """

    # --- painting --------------------------------------------------------------------------------------------------

    async def paint(
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
        """Paint pictures; see `Client.paint`."""
        options = PaintOptions(
            prompt, negative_prompt, model, width, height, steps, guidance_scale, scheduler, seed, image_count,
            media_type, quality, previews,
        )  # fmt: skip
        result = await last(self._paint_events(options, timeout_s), on_event)
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
    ) -> AsyncGenerator[types.PaintEvent, None]:
        """The same as events, the result last; see `Client.paint_stream`."""
        options = PaintOptions(
            prompt, negative_prompt, model, width, height, steps, guidance_scale, scheduler, seed, image_count,
            media_type, quality, previews,
        )  # fmt: skip
        return self._paint_events(options, timeout_s)

    # --- what there is ---------------------------------------------------------------------------------------------

    async def models(self, service: Service | None = None, *, timeout_s: float | None = None) -> list[types.Model]:
        """The models of one service, or of every service that the server offers."""
        if service == "ocr":
            answer, _ = await self._unary(self._ocr().ListModels, ocr_pb2.ListModelsRequest(), timeout_s)
            return list(inventory.ocr_models(answer))
        if service == "diffusion":
            painters = diffusion_pb2_grpc.DiffusionServiceStub(self._channel())
            answer, _ = await self._unary(painters.ListModels, diffusion_pb2.ListModelsRequest(), timeout_s)
            return list(inventory.diffusion_models(answer))
        try:
            found = await self.models("ocr", timeout_s=timeout_s)
        except Unimplemented:
            return await self.models("diffusion", timeout_s=timeout_s)
        try:
            return found + await self.models("diffusion", timeout_s=timeout_s)
        except Unimplemented:
            return found

    async def schedulers(self, *, timeout_s: float | None = None) -> list[types.Scheduler]:
        """The schedulers that `paint` knows by name."""
        stub = diffusion_pb2_grpc.DiffusionServiceStub(self._channel())
        request = diffusion_pb2.ListSchedulersRequest()
        answer, _ = await self._unary(stub.ListSchedulers, request, timeout_s)
        return inventory.schedulers(answer)

    async def fleet(self, *, service: str = "", hardware: str = "", timeout_s: float | None = None) -> list[types.Pool]:
        """The pools behind a gateway, with the state and load of their endpoints; empty strings for all."""
        stub = gateway_pb2_grpc.GatewayServiceStub(self._channel())
        request = inventory.list_pools_request(service, hardware)
        answer, _ = await self._unary(stub.ListPools, request, timeout_s)
        return inventory.pools(answer)

    async def load_model(
        self,
        name: str,
        *,
        precision: str | None = None,
        timeout_s: float | None = None,
        on_event: Callable[[types.LoadEvent], object] | None = None,
    ) -> types.OcrModel:
        """Load a model that reads and wait until it serves; see `Client.load_model`."""
        result = await last(self.load_model_stream(name, precision=precision, timeout_s=timeout_s), on_event)
        assert isinstance(result, types.LoadResult)
        return result.model

    def load_model_stream(
        self, name: str, *, precision: str | None = None, timeout_s: float | None = None
    ) -> AsyncGenerator[types.LoadEvent, None]:
        """The same as events, the result last; see `Client.load_model_stream`."""
        request = inventory.load_request(name, precision)
        return self._stream(self._ocr().LoadModel, request, inventory.load_event, types.LoadResult, timeout_s)

    async def unload_model(self, name: str, *, timeout_s: float | None = None) -> types.OcrModel:
        """Free a model's memory once the calls that use it are done; see `Client.unload_model`."""
        answer, _ = await self._unary(self._ocr().UnloadModel, inventory.unload_request(name), timeout_s)
        return inventory.ocr_model(answer.model)

    def _paint_events(self, options: PaintOptions, timeout_s: float | None) -> AsyncGenerator[types.PaintEvent, None]:
        request = paint.generate_request(options)
        method = diffusion_pb2_grpc.DiffusionServiceStub(self._channel()).Generate
        return self._stream(method, request, paint.paint_event, types.PaintResult, timeout_s)
