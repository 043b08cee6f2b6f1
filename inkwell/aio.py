"""The client for asyncio: the same calls as `inkwell.Client`, to be awaited or iterated with `async for`."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any, Literal, Unpack, overload

from google.longrunning import operations_pb2

from inkwell import types
from inkwell.aio_calls import last
from inkwell.aio_compiling import AsyncCompiling
from inkwell.aio_operation import AsyncOperation
from inkwell.aio_reader import AsyncReader
from inkwell.converters import inventory, paint
from inkwell.converters.asking import NOBODY_LOOKS_MS, attach, generate_request
from inkwell.converters.inventory import Service
from inkwell.diffusion.v1 import diffusion_pb2, diffusion_pb2_grpc
from inkwell.errors import Unimplemented
from inkwell.gateway.v1 import gateway_pb2_grpc
from inkwell.longrunning import list_request
from inkwell.ocr.v1 import ocr_pb2


class AsyncClient(AsyncReader, AsyncCompiling):
    """Reads and paints through one server, on one event loop.

    Arguments, results and errors are those of `inkwell.Client`. Cancelling the task that awaits a call, or closing
    (`aclose`) the iterator of one, cancels it at the server.
    """

    # --- painting --------------------------------------------------------------------------------------------------

    async def paint(
        self,
        prompt: str,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        on_event: Callable[[types.PaintEvent], object] | None = None,
        **options: Unpack[types.PaintOptions],
    ) -> list[types.Picture]:
        """Paint pictures; see `Client.paint`."""
        if on_event is None and options.get("progress_interval_ms") is None:
            options["progress_interval_ms"] = NOBODY_LOOKS_MS
        result = await last(self.paint_stream(prompt, timeout_s=timeout_s, request_id=request_id, **options), on_event)
        assert isinstance(result, types.PaintResult)
        return list(result.pictures)

    def paint_stream(
        self,
        prompt: str,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **options: Unpack[types.PaintOptions],
    ) -> AsyncGenerator[types.PaintEvent, None]:
        """The same as events, the result last; see `Client.paint_stream`."""
        request, attachments = generate_request(prompt, options)

        async def complete() -> diffusion_pb2.GenerateRequest:
            if attachments:
                await asyncio.to_thread(attach, attachments)
            return request

        def start(ready: diffusion_pb2.GenerateRequest) -> AsyncGenerator[types.PaintEvent, None]:
            method = self._diffusion().Generate
            return self._stream(method, ready, paint.paint_event, types.PaintResult, timeout_s, request_id)

        return self._later(complete, start)

    # --- what there is ---------------------------------------------------------------------------------------------

    async def models(self, service: Service | None = None, *, timeout_s: float | None = None) -> list[types.Model]:
        """The models of one service, or of every service that the server offers."""
        if service == "ocr":
            answer, _ = await self._unary(self._ocr().ListModels, ocr_pb2.ListModelsRequest(), timeout_s)
            return list(inventory.ocr_models(answer))
        if service == "diffusion":
            answer, _ = await self._unary(self._diffusion().ListModels, diffusion_pb2.ListModelsRequest(), timeout_s)
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
        request = diffusion_pb2.ListSchedulersRequest()
        answer, _ = await self._unary(self._diffusion().ListSchedulers, request, timeout_s)
        return inventory.schedulers(answer)

    async def fleet(self, *, service: str = "", hardware: str = "", timeout_s: float | None = None) -> list[types.Pool]:
        """The pools behind a gateway, with the state and load of their endpoints; empty strings for all."""
        stub = gateway_pb2_grpc.GatewayServiceStub(self._channel())
        request = inventory.list_pools_request(service, hardware)
        answer, _ = await self._unary(stub.ListPools, request, timeout_s)
        return inventory.pools(answer)

    async def adapters(self, *, timeout_s: float | None = None) -> list[types.Adapter]:
        """The LoRAs, textual inversion embeddings and image prompt adapters that `paint` knows by name."""
        request = diffusion_pb2.ListAdaptersRequest()
        answer, _ = await self._unary(self._diffusion().ListAdapters, request, timeout_s)
        return inventory.adapters(answer)

    async def controls(self, *, timeout_s: float | None = None) -> types.Controls:
        """The models that steer a composition, and the preprocessors that make conditions, that `paint` knows."""
        request = diffusion_pb2.ListControlsRequest()
        answer, _ = await self._unary(self._diffusion().ListControls, request, timeout_s)
        return inventory.controls(answer)

    @overload
    async def load_model(
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
    async def load_model(
        self,
        name: str,
        *,
        service: Literal["diffusion"],
        artifact: str = "",
        runtime: str = "",
        timeout_s: float | None = None,
        on_event: Callable[[types.LoadEvent], object] | None = None,
    ) -> types.DiffusionModel: ...

    async def load_model(
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
        """Load a model and wait until it serves; see `Client.load_model`."""
        events = self.load_model_stream(
            name, service=service, precision=precision, artifact=artifact, runtime=runtime, timeout_s=timeout_s
        )
        result = await last(events, on_event)
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
    ) -> AsyncGenerator[types.LoadEvent, None]:
        """The same as events, the result last; see `Client.load_model_stream`."""
        request = inventory.load_request(name, service, precision=precision, artifact=artifact, runtime=runtime)
        method = self._diffusion().LoadModel if service == "diffusion" else self._ocr().LoadModel
        return self._stream(method, request, inventory.load_event, types.LoadResult, timeout_s)

    @overload
    async def unload_model(
        self, name: str, *, service: Literal["ocr"] = "ocr", timeout_s: float | None = None
    ) -> types.OcrModel: ...

    @overload
    async def unload_model(
        self, name: str, *, service: Literal["diffusion"], timeout_s: float | None = None
    ) -> types.DiffusionModel: ...

    async def unload_model(self, name: str, *, service: Service = "ocr", timeout_s: float | None = None) -> types.Model:
        """Free a model's memory once the calls that use it are done; see `Client.unload_model`."""
        request = inventory.unload_request(name, service)
        method = self._diffusion().UnloadModel if service == "diffusion" else self._ocr().UnloadModel
        answer, _ = await self._unary(method, request, timeout_s)
        return inventory.model(answer.model)

    # --- operations ------------------------------------------------------------------------------------------------

    async def operation(self, name: str, *, timeout_s: float | None = None) -> AsyncOperation[Any]:
        """An operation by its name; see `Client.operation`."""
        request = operations_pb2.GetOperationRequest(name=name)
        answer, _ = await self._unary(self._operations().GetOperation, request, timeout_s)
        return AsyncOperation(self, answer)

    async def operations(
        self, service: str = "compiler", *, done: bool | None = None, timeout_s: float | None = None
    ) -> list[AsyncOperation[Any]]:
        """The operations of a service, newest first; see `Client.operations`."""
        found: list[AsyncOperation[Any]] = []
        page_token = ""
        while True:
            request = list_request(service, done, page_token)
            answer, _ = await self._unary(self._operations().ListOperations, request, timeout_s)
            found += [AsyncOperation(self, message) for message in answer.operations]
            page_token = answer.next_page_token
            if not page_token:
                return found

    def _diffusion(self) -> diffusion_pb2_grpc.DiffusionServiceStub:
        return diffusion_pb2_grpc.DiffusionServiceStub(self._channel())
