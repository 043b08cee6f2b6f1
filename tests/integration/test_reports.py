"""What servers say of themselves, and what their replies say of who answered; directly and through the gateway."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from inkwell.common.v1 import common_pb2
from inkwell.converters.shared import served_by
from inkwell.diffusion.v1 import diffusion_pb2, diffusion_pb2_grpc
from inkwell.endpoint.v1 import endpoint_pb2, endpoint_pb2_grpc
from inkwell.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from inkwell.ocr.v1 import ocr_pb2, ocr_pb2_grpc
from services import local
from services.compiler.__main__ import build
from services.kit import report as kit_report
from services.kit.boundary import Boundary
from services.kit.call import label_call
from services.kit.metrics import Metrics
from services.kit.report import Reporter
from tests.support import compiler_service


async def first_report(address: str) -> endpoint_pb2.Report:
    async with grpc.aio.insecure_channel(address) as channel:
        watch = endpoint_pb2_grpc.EndpointServiceStub(channel).WatchReport(endpoint_pb2.WatchReportRequest())
        async for answer in watch:
            said: endpoint_pb2.Report = answer.report
            if said.hardware.label and (said.service == "compiler" or any(model.loaded for model in said.models)):
                return said
    raise AssertionError("the stream ended")


@pytest.mark.parametrize("service", ["ocr", "diffusion"])
async def test_a_model_service_reports_its_hardware_and_models(fleet: dict[str, local.Service], service: str) -> None:
    said = await first_report(fleet[service].address)
    assert said.service == service
    assert said.version
    assert said.hardware.label == local.hardware_label()
    assert said.hardware.memory_bytes > 1 << 28
    assert said.hardware.core_count >= 1
    assert "torch" in said.runtimes
    first = said.models[0]
    assert (first.is_default, first.loaded, first.runtime) == (True, True, "torch")
    assert len(first.version) == 12
    assert first.memory_bytes > 1 << 20


async def test_the_compiler_reports_what_it_can_build_and_where_its_operations_are(tmp_path: Path) -> None:
    said = []
    for _ in range(2):  # the store's id outlives the process
        server = build(compiler_service.settings(tmp_path))
        await server.start()
        try:
            said.append(await first_report(f"127.0.0.1:{server.port}"))
        finally:
            await server.stop()
    assert {"onnxruntime", "openvino"} <= set(said[0].runtimes)
    assert said[0].hardware.label
    assert len(said[0].operations_store) == 32
    assert said[0].operations_store == said[1].operations_store


@pytest.mark.parametrize("through", ["ocr", "gateway"])
async def test_a_reply_says_which_model_version_and_runtime_answered(
    fleet: dict[str, local.Service], through: str
) -> None:
    version = (await first_report(fleet["ocr"].address)).models[0].version
    image = common_pb2.Image(content=local.DEMO_LINE.read_bytes())
    async with grpc.aio.insecure_channel(fleet[through].address) as channel:
        stub = ocr_pb2_grpc.OcrServiceStub(channel)
        calls: list[Any] = [
            stub.Recognize(ocr_pb2.RecognizeRequest(image=image)),
            stub.StreamRecognize(ocr_pb2.StreamRecognizeRequest(image=image)),
            stub.Embed(ocr_pb2.EmbedRequest(images=[image])),
        ]
        for call in calls:
            header = dict(await call.initial_metadata())
            assert header["inkwell-model"] == "handwriting-tiny"
            assert header["inkwell-model-version"] == version
            assert header["inkwell-runtime"] == "torch"
            assert ("inkwell-pool" in header) == (through == "gateway")
            call.cancel()
        refused = stub.Recognize(ocr_pb2.RecognizeRequest(image=image, model="none-such"))
        with pytest.raises(grpc.aio.AioRpcError):
            await refused
        assert "inkwell-model" not in dict(await refused.initial_metadata())


async def test_a_painted_stream_says_it_too(fleet: dict[str, local.Service]) -> None:
    async with grpc.aio.insecure_channel(fleet["gateway"].address) as channel:
        stub = diffusion_pb2_grpc.DiffusionServiceStub(channel)
        call = stub.Generate(diffusion_pb2.GenerateRequest(prompt="grinning face", step_count=1))
        header = dict(await call.initial_metadata())
        assert (header["inkwell-model"], header["inkwell-runtime"]) == ("emoji-tiny", "torch")
        assert len(header["inkwell-model-version"]) == 12
        call.cancel()


async def test_the_gateway_shows_what_services_report(fleet: dict[str, local.Service]) -> None:
    version = (await first_report(fleet["ocr"].address)).models[0].version
    async with grpc.aio.insecure_channel(fleet["gateway"].address) as channel:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        listed = await stub.ListPools(gateway_pb2.ListPoolsRequest(service="ocr"))
        assert f"handwriting-tiny@{version}" in listed.pools[0].endpoints[0].loaded_models
        assert listed.configuration.digest
        assert listed.configuration.error == ""


async def test_every_change_is_told_once_to_every_watcher() -> None:
    reporter = Reporter("ocr")
    server = grpc.aio.server()
    kit_report.register(server, reporter)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel, asyncio.timeout(60):
            stub = endpoint_pb2_grpc.EndpointServiceStub(channel)
            watches = [stub.WatchReport(endpoint_pb2.WatchReportRequest()) for _ in range(2)]
            for watch in watches:
                assert (await watch.read()).report.runtimes == []
            reporter.set(endpoint_pb2.Report(runtimes=["torch"]))
            reporter.set(endpoint_pb2.Report(runtimes=["torch"]))  # nothing new
            for watch in watches:
                assert (await watch.read()).report.runtimes == ["torch"]
            reporter.set(endpoint_pb2.Report(runtimes=["openvino"]))
            for watch in watches:
                told = (await watch.read()).report
                assert (told.service, list(told.runtimes)) == ("ocr", ["openvino"])
    finally:
        await server.stop(None)


async def test_a_report_is_made_again_when_asked_for_and_survives_a_failure() -> None:
    reporter = Reporter("ocr")
    made = 0
    asked = asyncio.Event()

    async def describe() -> endpoint_pb2.Report:
        nonlocal made
        made += 1
        asked.set()
        if made == 2:
            raise OSError("the folder is gone")
        return endpoint_pb2.Report(runtimes=[str(made)])

    async with reporter.following(describe), asyncio.timeout(60):
        for count in (1, 2, 3):
            await asked.wait()
            asked.clear()
            assert made == count
            reporter.look_again()
        await asked.wait()
        assert list(reporter.report.runtimes)[0] >= "3"


async def test_a_model_s_name_of_any_letters_arrives_as_it_is() -> None:
    async def answer(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        label_call(model="größe 100%\n", hardware="cpu", runtime="torch", version="0123456789ab")
        return request

    handler = grpc.unary_unary_rpc_method_handler(answer)
    server = grpc.aio.server(interceptors=[Boundary(Metrics("ocr"), max_message_bytes=1 << 20)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("some.Service", {"Call": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/some.Service/Call")(b"x")
            assert await call == b"x"
            served = served_by(await call.initial_metadata())
            assert (served.model, served.model_version, served.runtime) == ("größe 100%\n", "0123456789ab", "torch")
    finally:
        await server.stop(None)
