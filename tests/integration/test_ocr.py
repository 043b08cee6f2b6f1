"""The OCR service as its callers see it: a real server, a real engine process, a small model with random weights."""

import asyncio
import io
import struct
import uuid
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from PIL import Image

from inkwell.common.v1 import common_pb2
from inkwell.ocr.v1 import ocr_pb2, ocr_pb2_grpc
from services.kit.server import ServiceServer
from services.ocr.__main__ import build
from services.ocr.settings import Settings
from tests.support import tiny_trocr

pytestmark = pytest.mark.asyncio(loop_scope="module")

LONG = 400  # tokens that the model "long" always decodes: some hundred milliseconds, ample for a cancellation
IN_FLIGHT = 4


@dataclass
class Service:
    server: ServiceServer
    stub: Any

    def metric(self, name: str, **labels: str) -> float:
        return self.server.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("ocr-models")
    tiny_trocr.save(root / "tiny", tiny_trocr.build())
    tiny_trocr.save(root / "long", tiny_trocr.build(positions=512), min_new_tokens=LONG, max_new_tokens=LONG)
    return {"tiny": str(root / "tiny"), "long": str(root / "long")}


def settings(models: dict[str, str], **options: Any) -> Settings:
    return Settings(port=0, models=models, threads=1, max_rows=16, max_image_pixels=1_000_000, **options)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(models: dict[str, str]) -> AsyncIterator[Service]:
    server = build(settings(models, batch_in_flight=IN_FLIGHT, max_message_bytes=4 << 20))
    await server.start()
    try:
        await server.wait_ready()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield Service(server, ocr_pb2_grpc.OcrServiceStub(channel))
    finally:
        await server.stop(0)


def png(seed: int = 0) -> bytes:
    image = Image.frombytes("L", (12, 6), bytes((seed * 37 + i * 91) % 256 for i in range(72))).resize((120, 60), 0)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def request(content: bytes | None = None, *, kind: type[Message] = ocr_pb2.RecognizeRequest, **fields: Any) -> Any:
    decoding = ocr_pb2.DecodingOptions(**fields.pop("decoding", {}))
    image = common_pb2.Image(content=png() if content is None else content)
    return kind(image=image, decoding=decoding, **fields)


def batch_item(item_id: str, content: bytes | None = None, **fields: Any) -> Any:
    return request(content, kind=ocr_pb2.BatchRecognizeRequest, id=item_id, **fields)


async def each(*items: ocr_pb2.BatchRecognizeRequest) -> AsyncIterator[ocr_pb2.BatchRecognizeRequest]:
    for item in items:
        yield item


def detail(status: status_pb2.Status, kind: type[Message]) -> Any:
    """The detail of that type; fails if it is not there exactly once."""
    (packed,) = [d for d in status.details if d.Is(kind.DESCRIPTOR)]
    message = kind()
    packed.Unpack(message)
    return message


async def refusal(call: Any) -> status_pb2.Status:
    """The google.rpc.Status that the call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = rpc_status.from_call(caught.value)
    assert status is not None
    return status


async def until_engine_idle(service: Service) -> None:
    """Return when the engine holds no call; it says so within one step."""
    host = service.server.host
    assert host is not None
    async with asyncio.timeout(60):
        # Nobody is told of a slot that becomes free.
        while host.admission.running_count or host.admission.waiting_count:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


# --- reading ---


async def test_recognize_reads_a_line(service: Service) -> None:
    read = (await service.stub.Recognize(request())).recognition
    (hypothesis,) = read.hypotheses
    assert hypothesis.text
    assert read.model == "tiny"
    assert 0 < hypothesis.confidence <= 1
    assert sum(token.log_probability for token in hypothesis.tokens) == pytest.approx(hypothesis.log_probability)
    assert "".join(token.text for token in hypothesis.tokens) == hypothesis.text
    assert read.timing.engine_ms > 0
    assert read.timing.queue_ms >= 0


async def test_decoding_options_are_followed(service: Service) -> None:
    options = {"beam_width": 5, "hypothesis_count": 3, "length_penalty": 0.5, "max_new_token_count": 6}
    read = (await service.stub.Recognize(request(decoding=options))).recognition
    assert len(read.hypotheses) == 3
    assert [h.score for h in read.hypotheses] == sorted((h.score for h in read.hypotheses), reverse=True)
    for hypothesis in read.hypotheses:
        assert len(hypothesis.tokens) <= 6
        assert hypothesis.score == pytest.approx(hypothesis.log_probability / len(hypothesis.tokens) ** 0.5)


async def test_an_empty_line_is_blank_on_every_method(service: Service) -> None:
    buffer = io.BytesIO()
    Image.new("L", (300, 50), 230).save(buffer, "PNG")
    before = service.metric("inkwell_batch_size_count", model="tiny")
    read = (await service.stub.Recognize(request(buffer.getvalue()))).recognition
    assert read.blank
    assert [(h.text, len(h.tokens)) for h in read.hypotheses] == [("", 0)]
    assert (read.confidence, read.confidence_calibrated, read.truncated) == (1.0, False, False)
    streamed = request(buffer.getvalue(), kind=ocr_pb2.StreamRecognizeRequest)
    events = [e.WhichOneof("event") async for e in service.stub.StreamRecognize(streamed)]
    assert [event for event in events if event != "queued"] == ["started", "result"]
    (answer,) = [a async for a in service.stub.BatchRecognize(each(batch_item("x", buffer.getvalue())))]
    assert answer.result.blank
    assert service.metric("inkwell_batch_size_count", model="tiny") == before


async def test_no_repeat_ngram_size_is_followed(service: Service) -> None:
    read = (await service.stub.Recognize(request(decoding={"no_repeat_ngram_size": 1}))).recognition
    ids = [token.id for token in read.hypotheses[0].tokens]
    assert len(ids) == len(set(ids))
    assert not read.blank
    assert read.confidence == pytest.approx(read.hypotheses[0].confidence)


async def test_truncation_is_told(service: Service) -> None:
    one = (await service.stub.Recognize(request(decoding={"max_new_token_count": 1}))).recognition
    assert one.truncated
    assert len(one.hypotheses[0].tokens) == 1


async def test_a_stream_tells_how_the_reading_goes(service: Service) -> None:
    wanted = (await service.stub.Recognize(request())).recognition.hypotheses[0].text
    events = [e async for e in service.stub.StreamRecognize(request(kind=ocr_pb2.StreamRecognizeRequest))]
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    kinds = [event.WhichOneof("event") for event in events if event.WhichOneof("event") != "queued"]
    assert kinds[0] == "started"
    assert kinds[-1] == "result"
    assert set(kinds[1:-1]) == {"partial"}
    started = next(event.started for event in events if event.HasField("started"))
    assert (started.hardware, started.runtime, started.model) == ("cpu", "torch", "tiny")
    partials = [event.partial for event in events if event.HasField("partial")]
    assert [p.token_count for p in partials] == sorted({p.token_count for p in partials})
    assert all(wanted.startswith(p.text) for p in partials)  # greedy search never takes back
    assert events[-1].result.hypotheses[0].text == wanted


async def test_calls_that_are_sent_again_are_not_read_again(service: Service) -> None:
    def named() -> dict[str, Any]:
        return {"metadata": (("inkwell-request-id", str(uuid.uuid4())),)}

    tokens = service.metric("inkwell_decode_tokens_total", model="tiny")
    once = named()
    first = await service.stub.Recognize(request(), **once)
    decoded = service.metric("inkwell_decode_tokens_total", model="tiny") - tokens
    assert decoded > 0
    again = service.stub.Recognize(request(), **once)
    assert await again == first
    assert dict(await again.initial_metadata())["inkwell-model"] == "tiny"
    streamed = named()
    asked = request(kind=ocr_pb2.StreamRecognizeRequest)
    told = [[event async for event in service.stub.StreamRecognize(asked, **streamed)] for _ in range(2)]
    assert told[0] == told[1]
    assert service.metric("inkwell_decode_tokens_total", model="tiny") == tokens + 2 * decoded
    embedding = named()
    images = ocr_pb2.EmbedRequest(images=[common_pb2.Image(content=png())])
    assert await service.stub.Embed(images, **embedding) == await service.stub.Embed(images, **embedding)


async def test_list_models_shows_what_unset_options_mean(service: Service) -> None:
    models = {m.name: m for m in (await service.stub.ListModels(ocr_pb2.ListModelsRequest())).models}
    assert set(models) == {"tiny", "long"}
    tiny, long = models["tiny"], models["long"]
    assert (tiny.is_default, long.is_default) == (True, False)
    assert tiny.state == common_pb2.MODEL_STATE_READY
    assert (tiny.hardware, tiny.runtime, tiny.dtype) == ("cpu", "torch", "float32")
    assert tiny.parameter_count > 10_000
    assert (tiny.max_new_token_limit, long.max_new_token_limit) == (48, 512)
    assert tiny.default_decoding.beam_width == tiny.default_decoding.hypothesis_count == 1
    assert (tiny.default_decoding.max_new_token_count, long.default_decoding.max_new_token_count) == (48, LONG)
    assert tiny.default_decoding.length_penalty == 1.0


# --- bad input ---


def bomb() -> bytes:
    """The beginning of a PNG of 30,000x30,000 black pixels; the header is all that may be looked at."""
    return raw_png(30_000, 30_000, zlib.compress(bytes(30_001 * 1000)))


def raw_png(width: int, height: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


NAN = float("nan")
BAD = {
    "no image": (request(b""), "INVALID_ARGUMENT", "IMAGE_EMPTY", "image.content"),
    "no picture": (request(b"%PDF-1.7"), "INVALID_ARGUMENT", "IMAGE_NOT_RECOGNISED", "image.content"),
    "half a picture": (request(png()[:-60]), "INVALID_ARGUMENT", "IMAGE_TRUNCATED", "image.content"),
    "bomb": (request(bomb()), "RESOURCE_EXHAUSTED", "IMAGE_TOO_MANY_PIXELS", "image.content"),
    "0xN": (request(raw_png(0, 9, b"")), "INVALID_ARGUMENT", "IMAGE_TOO_SMALL", "image.content"),
    "model": (request(model="gpt"), "NOT_FOUND", "MODEL_NOT_FOUND", "model"),
    "no beams": (request(decoding={"beam_width": 0}), "INVALID_ARGUMENT", "INVALID_FIELD", "decoding.beam_width"),
    "17 beams": (request(decoding={"beam_width": 17}), "INVALID_ARGUMENT", "INVALID_FIELD", "decoding.beam_width"),
    "more hypotheses than beams": (
        request(decoding={"beam_width": 2, "hypothesis_count": 3}),
        "INVALID_ARGUMENT",
        "INVALID_FIELD",
        "decoding.hypothesis_count",
    ),
    "penalty": (
        request(decoding={"length_penalty": NAN}),
        "INVALID_ARGUMENT",
        "INVALID_FIELD",
        "decoding.length_penalty",
    ),
    "tokens": (
        request(decoding={"max_new_token_count": 49}),
        "INVALID_ARGUMENT",
        "INVALID_FIELD",
        "decoding.max_new_token_count",
    ),
    "message": (request(bytes(5 << 20)), "RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE", "message"),
}


@pytest.mark.parametrize(("bad", "code", "reason", "field"), BAD.values(), ids=BAD)
async def test_bad_input_is_refused_precisely_and_the_service_goes_on(
    service: Service, bad: ocr_pb2.RecognizeRequest, code: str, reason: str, field: str
) -> None:
    status = await refusal(service.stub.Recognize(bad))
    assert status.code == getattr(grpc.StatusCode, code).value[0]
    info = detail(status, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain) == (reason, "inkwell.dev")
    violations = detail(status, error_details_pb2.BadRequest).field_violations
    assert [violation.field for violation in violations] == [field]
    assert field in status.message
    assert not any(d.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for d in status.details)  # it will never fit
    # The streaming methods say the same.
    streamed = service.stub.StreamRecognize(
        ocr_pb2.StreamRecognizeRequest(image=bad.image, model=bad.model, decoding=bad.decoding)
    )
    assert (await refusal(streamed.read())).message == status.message
    if field != "message":
        item = ocr_pb2.BatchRecognizeRequest(id="x", image=bad.image, model=bad.model, decoding=bad.decoding)
        (answer,) = [a async for a in service.stub.BatchRecognize(each(item))]
        assert answer.error == status
    assert (await service.stub.Recognize(request())).recognition.hypotheses


async def test_every_wrong_option_is_named_at_once(service: Service) -> None:
    options = {
        "beam_width": 99,
        "length_penalty": 6.0,
        "max_new_token_count": 0,
        "no_repeat_ngram_size": 65,
        "early_stopping": 7,
    }
    status = await refusal(service.stub.Recognize(request(decoding=options)))
    violations = detail(status, error_details_pb2.BadRequest).field_violations
    assert {v.field: v.description for v in violations} == {
        "decoding.beam_width": "99 is not in 1 to 16",
        "decoding.length_penalty": "6 is not in -5 to 5",
        "decoding.max_new_token_count": "0 is not in 1 to 48, the limit of tiny",
        "decoding.no_repeat_ngram_size": "65 is not in 0 to 64",
        "decoding.early_stopping": "7 is none of: EARLY_STOPPING_FIRST (1), EARLY_STOPPING_HEURISTIC (2),"
        " EARLY_STOPPING_NEVER (3)",
    }


async def test_an_unknown_model_is_told_what_there_is(service: Service) -> None:
    status = await refusal(service.stub.Recognize(request(model="gpt")))
    resource = detail(status, error_details_pb2.ResourceInfo)
    assert (resource.resource_type, resource.resource_name) == ("model", "gpt")
    assert "long, tiny" in status.message


async def test_an_unknown_priority_is_refused(service: Service) -> None:
    call = service.stub.Recognize(request(), metadata=(("inkwell-priority", "urgent"),))
    assert detail(await refusal(call), error_details_pb2.BadRequest).field_violations


async def test_calls_before_the_engine_is_ready_may_be_retried(models: dict[str, str]) -> None:
    server = build(settings(models))
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = ocr_pb2_grpc.OcrServiceStub(channel)
            listed = (await stub.ListModels(ocr_pb2.ListModelsRequest())).models
            assert {(m.name, m.state, m.is_default) for m in listed} == {
                ("tiny", common_pb2.MODEL_STATE_LOADING, True),
                ("long", common_pb2.MODEL_STATE_LOADING, False),
            }
            for call in (stub.Recognize(request()), stub.BatchRecognize(each(batch_item("1"))).read()):
                status = await refusal(call)
                assert status.code == grpc.StatusCode.UNAVAILABLE.value[0]
                assert detail(status, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
    finally:
        await server.stop(0)


# --- cancellation ---


async def test_a_cancelled_call_frees_its_rows_and_leaves_its_neighbour_alone(service: Service) -> None:
    alone = (await service.stub.Recognize(request(png(1), model="long"))).recognition.hypotheses[0]
    before = service.metric("inkwell_cancelled_total", phase="running")
    # Together these take 16 rows, all there are: the last call can only start on rows that were given back.
    doomed = service.stub.StreamRecognize(
        request(kind=ocr_pb2.StreamRecognizeRequest, model="long", decoding={"beam_width": 15})
    )
    while not (await doomed.read()).HasField("started"):
        pass
    neighbour = service.stub.Recognize(request(png(1), model="long"))
    while not (await doomed.read()).HasField("partial"):
        pass
    doomed.cancel()
    last = service.stub.Recognize(request(png(2), decoding={"beam_width": 16}))
    assert (await last).recognition.hypotheses[0].text
    read = (await neighbour).recognition.hypotheses[0]
    assert [token.id for token in read.tokens] == [token.id for token in alone.tokens]
    await until_engine_idle(service)
    assert service.metric("inkwell_cancelled_total", phase="running") == before + 1


# --- many lines over one stream ---


async def test_a_batch_answers_every_item_by_its_id(service: Service) -> None:
    items = [batch_item(f"line {n}", png(n)) for n in range(12)]
    items.insert(3, batch_item("broken", b"GIF89a"))
    answers = [a async for a in service.stub.BatchRecognize(each(*items))]
    assert [a.sequence for a in answers] == list(range(1, 14))
    by_id = {a.id: a for a in answers}
    assert by_id.keys() == {item.id for item in items}
    assert detail(by_id.pop("broken").error, error_details_pb2.ErrorInfo).reason == "IMAGE_NOT_RECOGNISED"
    for n in range(12):
        alone = (await service.stub.Recognize(request(png(n)))).recognition
        assert by_id[f"line {n}"].result.hypotheses[0].text == alone.hypotheses[0].text


async def test_a_quick_item_does_not_wait_for_a_slow_one(service: Service) -> None:
    items = each(batch_item("slow", model="long"), batch_item("quick", decoding={"max_new_token_count": 2}))
    assert [a.id async for a in service.stub.BatchRecognize(items)] == ["quick", "slow"]


@pytest.mark.parametrize(
    ("item_id", "reason"), [("", "INVALID_FIELD"), ("x" * 129, "INVALID_FIELD"), ("first", "DUPLICATE_ID")]
)
async def test_an_unfit_item_id_is_that_items_error(service: Service, item_id: str, reason: str) -> None:
    items = each(batch_item("first", model="long"), batch_item(item_id), batch_item("last"))
    answers = [a async for a in service.stub.BatchRecognize(items)]
    (error,) = [a for a in answers if a.HasField("error")]
    assert error.id == item_id
    assert detail(error.error, error_details_pb2.ErrorInfo).reason == reason
    assert [v.field for v in detail(error.error, error_details_pb2.BadRequest).field_violations] == ["id"]
    assert {a.id for a in answers if a.HasField("result")} == {"first", "last"}


async def test_a_batch_holds_only_so_many_items_at_a_time(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    host = service.server.host
    assert host is not None
    most, admit = 0, host.admit

    def counting(**options: Any) -> Any:
        nonlocal most
        job = admit(**options)
        most = max(most, host.admission.waiting_count + host.admission.running_count)
        return job

    monkeypatch.setattr(host, "admit", counting)
    items = [batch_item(str(n), png(n), decoding={"max_new_token_count": 3}) for n in range(40)]
    answers = [a async for a in service.stub.BatchRecognize(each(*items))]
    assert len(answers) == 40
    assert all(a.HasField("result") for a in answers)
    assert 1 < most <= IN_FLIGHT


async def test_items_taken_in_are_answered_before_the_stream_fails(service: Service) -> None:
    call = service.stub.BatchRecognize(each(batch_item("slow", model="long"), batch_item("big", bytes(5 << 20))))
    answer = await call.read()
    assert (answer.id, answer.WhichOneof("outcome")) == ("slow", "result")
    status = await refusal(call.read())
    assert detail(status, error_details_pb2.ErrorInfo).reason == "MESSAGE_TOO_LARGE"


async def test_a_cancelled_batch_leaves_nothing_in_the_engine(service: Service) -> None:
    call = service.stub.BatchRecognize(each(*(batch_item(str(n), model="long") for n in range(IN_FLIGHT))))
    await call.wait_for_connection()
    call.cancel()
    await until_engine_idle(service)
    assert (await service.stub.Recognize(request())).recognition.hypotheses


async def test_what_the_engine_did_is_counted(service: Service) -> None:
    tokens = service.metric("inkwell_decode_tokens_total", model="tiny")
    read = (await service.stub.Recognize(request(decoding={"max_new_token_count": 5}))).recognition
    counted = service.metric("inkwell_decode_tokens_total", model="tiny") - tokens
    assert counted == len(read.hypotheses[0].tokens)
    assert service.metric("inkwell_batch_size_count", model="tiny") > 0
