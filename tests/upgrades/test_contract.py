"""Programs and services of the last release beside those of today, over real services.

A program of the last release has stubs that were generated from its protos. A service of the last release is one of
today behind a server that understands only what the release did: what is newer is lost on the way, in both directions.
"""

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2

import inkwell
from inkwell.ocr.v1 import ocr_pb2
from services import local
from tests.support import released
from tests.support.gateway import running
from tests.support.released import Past, Stub, message, past_of

SAMPLES = Path(__file__).resolve().parents[2] / "models" / "handwriting-tiny" / "samples"
LINE = (SAMPLES / "01-fox.png").read_bytes()
TIMEOUT_S = 120.0


@pytest.fixture
async def old_program(fleet: dict[str, local.Service]) -> AsyncIterator[grpc.aio.Channel]:
    """What a program of the last release has: a channel to today's gateway."""
    async with grpc.aio.insecure_channel(fleet["gateway"].address) as channel:
        yield channel


@pytest.fixture
async def past(fleet: dict[str, local.Service]) -> AsyncIterator[tuple[Past, inkwell.AsyncClient]]:
    """A gateway of the last release, and today's client of it."""
    async with (
        past_of(fleet["gateway"].address) as (server, address),
        inkwell.AsyncClient(address, timeout_s=TIMEOUT_S) as client,
    ):
        yield server, client


def test_the_release_is_apart_from_today() -> None:
    request = message("inkwell.ocr.v1.RecognizeRequest")
    assert request is not ocr_pb2.RecognizeRequest
    assert request.DESCRIPTOR.full_name == ocr_pb2.RecognizeRequest.DESCRIPTOR.full_name


def test_what_the_release_did_not_know_is_lost_on_the_way() -> None:
    file = descriptor_pb2.FileDescriptorProto(name="later.proto", package="inkwell.ocr.v1", syntax="proto3")
    later = file.message_type.add(name="RecognizeRequest")
    later.field.add(name="model", number=2, type="TYPE_STRING", label="LABEL_OPTIONAL")
    later.field.add(name="newer", number=1999, type="TYPE_STRING", label="LABEL_OPTIONAL")
    made = released.made_of(file, "inkwell.ocr.v1.RecognizeRequest")
    said = made(newer="what nobody knew").SerializeToString()
    assert released.without_unknown(message("inkwell.ocr.v1.RecognizeRequest").FromString(said)) == b""


class TestAnOldProgramWithServicesOfToday:
    async def test_reads(self, old_program: grpc.aio.Channel) -> None:
        stub = Stub(old_program, "inkwell.ocr.v1.OcrService")
        asked = message("inkwell.ocr.v1.RecognizeRequest")(image={"content": LINE})
        answer = await stub.Recognize(asked, timeout=TIMEOUT_S)
        assert answer.recognition.hypotheses[0].text
        streamed = message("inkwell.ocr.v1.StreamRecognizeRequest")(image={"content": LINE})
        events = [each async for each in stub.StreamRecognize(streamed, timeout=TIMEOUT_S)]
        assert [each.sequence for each in events] == list(range(1, len(events) + 1))
        assert events[-1].result.hypotheses[0].text == answer.recognition.hypotheses[0].text

    async def test_paints(self, old_program: grpc.aio.Channel) -> None:
        stub = Stub(old_program, "inkwell.diffusion.v1.DiffusionService")
        asked = message("inkwell.diffusion.v1.GenerateRequest")(prompt="a cat", step_count=2, seed=1)
        events = [each async for each in stub.Generate(asked, timeout=TIMEOUT_S)]
        kinds = [each.WhichOneof("event") for each in events]
        assert kinds[-1] == "result"
        assert kinds.count("progress") == 2
        assert events[-1].result.images

    async def test_looks_at_the_fleet_and_the_models(self, old_program: grpc.aio.Channel) -> None:
        gateway = Stub(old_program, "inkwell.gateway.v1.GatewayService")
        pools = (await gateway.ListPools(message("inkwell.gateway.v1.ListPoolsRequest")(), timeout=TIMEOUT_S)).pools
        assert {pool.service for pool in pools} >= {"ocr", "diffusion"}
        assert all(endpoint.address for pool in pools for endpoint in pool.endpoints)
        ocr = Stub(old_program, "inkwell.ocr.v1.OcrService")
        models = (await ocr.ListModels(message("inkwell.ocr.v1.ListModelsRequest")(), timeout=TIMEOUT_S)).models
        assert "handwriting-tiny" in [model.name for model in models]

    async def test_understands_a_refusal(self, old_program: grpc.aio.Channel) -> None:
        stub = Stub(old_program, "inkwell.ocr.v1.OcrService")
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.Recognize(message("inkwell.ocr.v1.RecognizeRequest")(model="none"), timeout=TIMEOUT_S)
        assert failed.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)


class TestAProgramOfTodayWithOldServices:
    async def test_reads(self, past: tuple[Past, inkwell.AsyncClient]) -> None:
        _, client = past
        whole = await client.read(LINE)
        assert whole.text
        events = [event async for event in client.read_stream(LINE)]
        assert isinstance(events[-1], inkwell.types.ReadResult)
        assert events[-1].reading.text == whole.text
        many = [outcome async for _, outcome in client.read_many([LINE, LINE])]
        assert [outcome.text for outcome in many if isinstance(outcome, inkwell.types.Reading)] == [whole.text] * 2

    async def test_paints_and_does_without_what_the_service_does_not_know(
        self, past: tuple[Past, inkwell.AsyncClient]
    ) -> None:
        server, client = past
        steps: list[object] = []
        assert await client.paint(
            "a cat", steps=4, seed=1, progress_interval_ms=3_600_000, on_event=lambda event: steps.append(event)
        )
        # It was asked to tell less and does not know how.
        assert server.unknown == {"inkwell.diffusion.v1.GenerateRequest"}
        assert len([event for event in steps if isinstance(event, inkwell.types.Progress)]) == 4

    async def test_lists_what_there_is(self, past: tuple[Past, inkwell.AsyncClient]) -> None:
        _, client = past
        pools = await client.fleet()
        assert {pool.service for pool in pools} >= {"ocr", "diffusion"}
        assert {endpoint.version for pool in pools for endpoint in pool.endpoints} == {""}
        assert {model.name for model in await client.models()} >= {"handwriting-tiny", "emoji-tiny"}

    async def test_a_gateway_of_today_routes_to_a_service_that_reports_nothing(
        self, fleet: dict[str, local.Service]
    ) -> None:
        async with past_of(fleet["ocr"].address) as (server, address):
            pool = {"name": "ocr-cpu", "service": "ocr", "hardware": "cpu", "targets": [address]}
            async with running(pool) as gateway:
                target = f"127.0.0.1:{gateway.server.port}"
                async with inkwell.AsyncClient(target, timeout_s=TIMEOUT_S) as client:
                    assert (await client.read(LINE)).text
        assert "/inkwell.endpoint.v1.EndpointService/WatchReport" in server.missed
