"""inkwell.endpoint.v1.EndpointService: what a server says of itself, told anew whenever it changes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import structlog

from inkwell.endpoint.v1 import endpoint_pb2, endpoint_pb2_grpc
from inkwell.version import __version__
from services.kit.device import Device

log = structlog.get_logger(__name__)

# Models come and go in folders without telling anybody, so they are looked up again this often.
_LOOK_AGAIN_S = 10.0


class Reporter(endpoint_pb2_grpc.EndpointServiceServicer):
    """Keeps one report and tells it to every watcher. Made and used on one event loop.

    service: configuration name, such as "ocr".
    """

    def __init__(self, service: str) -> None:
        self.report = endpoint_pb2.Report(service=service, version=__version__)
        self._changed = asyncio.Event()
        self._look = asyncio.Event()

    def set(self, report: endpoint_pb2.Report) -> None:
        """Tell this from now on, if it is anything new; service and version are filled in."""
        report.service, report.version = self.report.service, self.report.version
        if report != self.report:
            self.report = report
            told, self._changed = self._changed, asyncio.Event()
            told.set()

    def look_again(self) -> None:
        """What `following` describes has changed."""
        self._look.set()

    @contextlib.asynccontextmanager
    async def following(self, describe: Callable[[], Awaitable[endpoint_pb2.Report]]) -> AsyncIterator[None]:
        """Keep the report as `describe` answers, inside this: now, after each `look_again`, and every ten seconds."""
        task = asyncio.create_task(self._follow(describe), name="report")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _follow(self, describe: Callable[[], Awaitable[endpoint_pb2.Report]]) -> None:
        while True:
            self._look.clear()
            try:
                self.set(await describe())
            except Exception:
                # A folder that cannot be read must not silence the server for good.
                log.exception("the report could not be made")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_AGAIN_S):
                    await self._look.wait()

    async def WatchReport(  # noqa: N802 - the name is the protocol's
        self, request: endpoint_pb2.WatchReportRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[endpoint_pb2.WatchReportResponse]:
        while True:
            changed = self._changed
            yield endpoint_pb2.WatchReportResponse(report=self.report)
            await changed.wait()


def register(server: grpc.aio.Server, reporter: Reporter) -> str:
    """Add the service to the server; answers its full name, for reflection."""
    endpoint_pb2_grpc.add_EndpointServiceServicer_to_server(reporter, server)
    return endpoint_pb2.DESCRIPTOR.services_by_name["EndpointService"].full_name


def hardware(device: Device) -> endpoint_pb2.Hardware:
    """A device as it is reported."""
    return endpoint_pb2.Hardware(
        label=device.label,
        device=device.name,
        memory_bytes=device.memory_bytes,
        compute_capability=device.compute_capability,
        core_count=device.core_count,
    )
