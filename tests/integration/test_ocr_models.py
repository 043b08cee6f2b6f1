"""Models that come and go while the service serves, language hints, and embeddings, as callers see them."""

import asyncio
import io
import json
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
import torch
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from PIL import Image
from transformers import AutoImageProcessor, VisionEncoderDecoderModel

from inkwell.common.v1 import common_pb2
from inkwell.ocr.v1 import ocr_pb2, ocr_pb2_grpc
from services.kit.server import ServiceServer
from services.ocr.__main__ import build
from services.ocr.settings import Settings
from services.runtimes import precision
from services.runtimes.hardware import detect
from tests.support import tiny_trocr

pytestmark = pytest.mark.asyncio(loop_scope="module")

READY, UNLOADED, LOADING = (
    common_pb2.MODEL_STATE_READY,
    common_pb2.MODEL_STATE_UNLOADED,
    common_pb2.MODEL_STATE_LOADING,
)
LONG = 400


@dataclass
class Service:
    server: ServiceServer
    stub: Any
    folder: Path

    async def models(self) -> dict[str, Any]:
        return {m.name: m for m in (await self.stub.ListModels(ocr_pb2.ListModelsRequest())).models}

    async def load(self, name: str, **fields: Any) -> list[Any]:
        return [e async for e in self.stub.LoadModel(ocr_pb2.LoadModelRequest(name=name, **fields))]

    async def unload(self, name: str) -> Any:
        return (await self.stub.UnloadModel(ocr_pb2.UnloadModelRequest(name=name))).model

    async def read(self, name: str = "", *, seed: int = 0, **fields: Any) -> Any:
        request = ocr_pb2.RecognizeRequest(image=common_pb2.Image(content=png(seed)), model=name, **fields)
        return (await self.stub.Recognize(request)).recognition

    async def until_unloaded(self, *names: str) -> None:
        for name in names:
            await self.unload(name)


def card(folder: Path, languages: Any) -> None:
    (folder / "README.md").write_text(f"---\nlicense: mit\nlanguage: {json.dumps(languages)}\n---\n# A model\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: french, polish, long (reads for some hundred milliseconds) and broken."""
    root = tmp_path_factory.mktemp("models")
    for number, name in enumerate(("default", "french", "polish")):
        tiny_trocr.save(root / name, tiny_trocr.build(seed=number))
    tiny_trocr.save(root / "long", tiny_trocr.build(positions=512), min_new_tokens=LONG, max_new_tokens=LONG)
    card(root / "default", "en")
    card(root / "french", ["fr-FR", "oc"])
    card(root / "polish", "pl")
    shutil.copytree(root / "french", root / "broken")
    card(root / "broken", [])
    weights = (root / "broken" / "model.safetensors").read_bytes()
    (root / "broken" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    return root


async def serving(folder: Path, **options: Any) -> AsyncIterator[Service]:
    settings = Settings(
        port=0,
        models={"default": str(folder / "default")},
        model_folder=str(folder),
        threads=1,
        max_rows=16,
        read_documents=False,
        **options,
    )
    server = build(settings)
    await server.start()
    try:
        await server.wait_ready()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield Service(server, ocr_pb2_grpc.OcrServiceStub(channel), folder)
    finally:
        await server.stop(0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(folder: Path) -> AsyncIterator[Service]:
    async for running in serving(folder, embed_reply_bytes_limit=60_000, embed_image_limit=8):
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def narrow(folder: Path) -> AsyncIterator[Service]:
    """A service with tight limits, that loads nothing at its start and takes Polish for Czech."""
    limits = {"embed_reply_bytes_limit": 1700, "max_image_pixels": 10_000, "memory_limit_bytes": 300_000}
    async for running in serving(folder, load_at_start=[], languages={"polish": ["cs"]}, **limits):
        yield running


def png(seed: int = 0, size: tuple[int, int] = (120, 60)) -> bytes:
    image = Image.frombytes("L", (12, 6), bytes((seed * 37 + i * 91) % 256 for i in range(72))).resize(size, 0)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def detail(status: status_pb2.Status, kind: type[Message]) -> Any:
    (packed,) = [d for d in status.details if d.Is(kind.DESCRIPTOR)]
    message = kind()
    packed.Unpack(message)
    return message


async def refusal(call: Any) -> tuple[str, str, str]:
    """Code, reason and message that the call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = rpc_status.from_call(caught.value)
    assert status is not None
    return caught.value.code().name, detail(status, error_details_pb2.ErrorInfo).reason, status.message


# --- coming and going ---


async def test_models_of_the_folder_are_known_and_not_loaded(service: Service) -> None:
    await service.until_unloaded("french", "polish", "long")
    models = await service.models()
    assert set(models) == {"default", "french", "polish", "long", "broken"}
    assert next(iter(models)) == "default"
    assert {name: m.state for name, m in models.items()} == {
        "default": READY,
        "french": UNLOADED,
        "polish": UNLOADED,
        "long": UNLOADED,
        "broken": UNLOADED,
    }
    assert list(models["french"].languages) == ["fr-FR", "oc"]
    assert models["french"].weight_bytes == (service.folder / "french" / "model.safetensors").stat().st_size
    assert models["default"].precision == ocr_pb2.PRECISION_FLOAT32
    assert models["default"].weight_bytes >= 4 * models["default"].parameter_count
    assert models["default"].embedding_width == 24


async def test_loading_tells_its_stages_and_ends_with_the_model(service: Service) -> None:
    await service.unload("french")
    events = await service.load("french")
    assert [e.sequence for e in events] == list(range(1, len(events) + 1))
    assert [e.progress.stage for e in events[:-1]] == [
        ocr_pb2.LOAD_STAGE_WAITING,
        ocr_pb2.LOAD_STAGE_READING_WEIGHTS,
        ocr_pb2.LOAD_STAGE_WARMING,
    ]
    assert events[-1].result.model.name == "french"
    assert events[-1].result.elapsed_ms >= 0
    assert events[-1].result.model == (await service.models())["french"]
    assert events[-1].result.model.state == READY
    again = await service.load("french")
    assert [e.WhichOneof("event") for e in again] == ["result"]
    unloaded = await service.unload("french")
    assert unloaded.state == UNLOADED
    assert unloaded == (await service.models())["french"]
    assert unloaded.max_new_token_limit == 48  # still known from when it was loaded


async def test_a_call_loads_the_model_it_names(service: Service) -> None:
    await service.unload("polish")
    read = await service.read("polish", seed=3)
    assert read.model == "polish"
    assert (await service.models())["polish"].state == READY
    assert (await service.read("polish", seed=3)).hypotheses == read.hypotheses


async def test_many_callers_share_one_load(service: Service) -> None:
    await service.unload("polish")
    reads = await asyncio.gather(*(service.read("polish", seed=3) for _ in range(12)))
    assert len({read.hypotheses[0].text for read in reads}) == 1
    await service.unload("french")
    courses = await asyncio.gather(*(service.load("french") for _ in range(4)))
    assert all(course[-1].result.model.state == READY for course in courses)


async def test_a_folder_written_while_serving_can_be_read_with(service: Service) -> None:
    assert (await refusal(service.read("fresh")))[:2] == ("NOT_FOUND", "MODEL_NOT_FOUND")
    shutil.copytree(service.folder / "polish", service.folder / ".fresh")
    (service.folder / ".fresh").rename(service.folder / "fresh")
    try:
        assert (await service.load("fresh"))[-1].result.model.name == "fresh"
        ours, theirs = await service.read("fresh", seed=3), await service.read("polish", seed=3)
        assert ours.hypotheses[0].text == theirs.hypotheses[0].text
    finally:
        shutil.rmtree(service.folder / "fresh")
    # It serves until it is unloaded, and is gone then.
    assert (await service.read("fresh", seed=3)).model == "fresh"
    assert (await service.unload("fresh")).state == UNLOADED
    assert "fresh" not in await service.models()
    assert (await refusal(service.read("fresh")))[0] == "NOT_FOUND"


async def test_reading_goes_on_while_a_model_is_loaded(service: Service) -> None:
    """A batch stream that is answered between the stages of a load was not held up by it."""
    await service.unload("polish")
    course = service.stub.LoadModel(ocr_pb2.LoadModelRequest(name="polish"))
    told = []
    async for event in course:
        told.append(event.WhichOneof("event"))
        if told == ["progress"]:
            assert (await service.read("default")).model == "default"
    assert told[-1] == "result"


async def test_a_model_in_use_is_unloaded_when_its_calls_are_done(service: Service) -> None:
    await service.load("long")
    stream = service.stub.StreamRecognize(
        ocr_pb2.StreamRecognizeRequest(image=common_pb2.Image(content=png()), model="long")
    )
    while not (await stream.read()).HasField("partial"):
        pass
    unloading = asyncio.create_task(service.unload("long"))
    while not (event := await stream.read()).HasField("result"):
        pass
    assert len(event.result.hypotheses[0].tokens) == LONG
    assert (await unloading).state == UNLOADED
    # Calls that come while it leaves are read with it all the same.
    reading = asyncio.create_task(service.read("long", seed=1))
    leaving = asyncio.create_task(service.unload("long"))
    assert (await reading).model == "long"
    await leaving


async def test_another_precision_replaces_the_model(service: Service) -> None:
    await service.unload("french")
    has_bfloat16 = not precision.refusal("bfloat16", detect())
    # The other is the one that every processor computes.
    low = ocr_pb2.PRECISION_BFLOAT16 if has_bfloat16 else ocr_pb2.PRECISION_INT8_WEIGHT_ONLY
    await service.load("french", precision=low)
    listed = (await service.models())["french"]
    assert listed.precision == low
    assert listed.dtype == "bfloat16" or not has_bfloat16
    before = listed.weight_bytes
    stream = service.stub.StreamRecognize(
        ocr_pb2.StreamRecognizeRequest(image=common_pb2.Image(content=png()), model="french")
    )
    assert (await service.load("french"))[-1].result.model.precision == ocr_pb2.PRECISION_FLOAT32
    assert [event async for event in stream][-1].HasField("result")
    after = (await service.models())["french"].weight_bytes
    assert after == 2 * before if has_bfloat16 else after > 2 * before


async def test_a_broken_folder_fails_alone_and_says_why(service: Service) -> None:
    code, reason, message = await refusal(service.load("broken"))
    assert (code, reason) == ("FAILED_PRECONDITION", "MODEL_UNUSABLE")
    assert "broken: model.safetensors is not a whole safetensors file: it has" in message
    assert (await refusal(service.read("broken")))[1] == "MODEL_UNUSABLE"
    assert (await service.models())["broken"].state == UNLOADED
    assert (await service.read()).model == "default"


def other_class(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))


def other_decoder(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["decoder"]["model_type"] = "gpt2"
    (folder / "config.json").write_text(json.dumps(config))


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def no_processor(folder: Path) -> None:
    for file in folder.glob("*processor*"):
        file.unlink()


def half_a_config(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[: len(text) // 2])


def odd_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 1000)


def wider_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["decoder"]["d_model"] = 64
    (folder / "config.json").write_text(json.dumps(config))


DAMAGES = {
    other_class: "model_type 'bert'",
    other_decoder: "decoder has model_type 'gpt2'",
    no_weights: "it has no weights",
    no_tokenizer: "tokenizer cannot be loaded",
    no_processor: "image processor cannot be loaded",
    half_a_config: "config.json cannot be read",
    odd_weights: "not a whole safetensors file",
    wider_config: "weights have another shape than config.json says, first decoder.",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
async def test_what_is_wrong_with_a_folder_is_said(service: Service, damage: Any) -> None:
    damaged = service.folder / "damaged"
    shutil.copytree(service.folder / "french", damaged)
    try:
        damage(damaged)
        code, reason, message = await refusal(service.load("damaged"))
        assert (code, reason) == ("FAILED_PRECONDITION", "MODEL_UNUSABLE")
        assert "damaged" in message
        assert DAMAGES[damage] in message
    finally:
        shutil.rmtree(damaged)
    assert (await service.read()).model == "default"


@pytest.mark.parametrize("name", ["", "nobody", "../models/french", "/etc", ".", "french/..", "x" * 100_000])
async def test_names_are_no_paths(service: Service, name: str) -> None:
    wanted = ("INVALID_ARGUMENT", "INVALID_FIELD") if not name else ("NOT_FOUND", "MODEL_NOT_FOUND")
    for call in (service.load(name), service.unload(name)):
        code, reason, message = await refusal(call)
        assert (code, reason) == wanted
        assert len(message) < 400


async def test_a_precision_that_is_none_is_refused(service: Service) -> None:
    code, _, message = await refusal(service.load("french", precision=99))
    assert code == "INVALID_ARGUMENT"
    assert "PRECISION_INT8_DYNAMIC (4)" in message


# --- memory ---


async def test_only_named_models_are_loaded_at_the_start(narrow: Service) -> None:
    assert {m.state for m in (await narrow.models()).values()} == {UNLOADED}
    assert (await narrow.read()).model == "default"
    assert (await narrow.models())["default"].state == READY


async def test_the_least_recently_used_model_leaves_when_memory_is_short(narrow: Service) -> None:
    # There is room for two of 145 kB.
    await narrow.load("default")
    await narrow.load("french")
    await narrow.read("default")
    events = await narrow.load("polish")
    assert list(events[-2].progress.evicted_models) == ["french"]
    states = {name: m.state for name, m in (await narrow.models()).items()}
    assert (states["default"], states["french"], states["polish"]) == (READY, UNLOADED, READY)


async def test_no_call_is_lost_when_models_take_turns_in_memory(narrow: Service) -> None:
    names = ["default", "french", "polish"] * 6
    reads = await asyncio.gather(*(narrow.read(name, seed=3) for name in names))
    assert [read.model for read in reads] == names
    for name in set(names):
        assert len({read.hypotheses[0].text for read in reads if read.model == name}) == 1


async def test_a_model_that_can_never_fit_is_refused(narrow: Service) -> None:
    tiny_trocr.save(narrow.folder / "large", tiny_trocr.build(layers=8))
    try:
        code, reason, message = await refusal(narrow.load("large"))
    finally:
        shutil.rmtree(narrow.folder / "large")
    assert (code, reason) == ("RESOURCE_EXHAUSTED", "MODEL_TOO_LARGE")
    assert "300000" in message


# --- languages ---


@pytest.mark.parametrize(
    ("hints", "model"),
    [
        (["fr-FR"], "french"),
        (["FR"], "french"),
        (["fr-CA", "pl"], "french"),
        (["uk", "pl-PL"], "polish"),
        (["en"], "default"),
        ([], "default"),
    ],
)
async def test_language_hints_choose_the_model(service: Service, hints: list[str], model: str) -> None:
    assert (await service.read(language_hints=hints)).model == model


async def test_a_named_model_needs_no_hint_to_agree(service: Service) -> None:
    assert (await service.read("polish", language_hints=["fr"])).model == "polish"
    code, _, message = await refusal(service.read("polish", language_hints=["fr", "not a tag"]))
    assert code == "INVALID_ARGUMENT"
    assert "language_hints[1]" in message


async def test_a_language_that_nobody_reads_is_told(service: Service) -> None:
    code, reason, message = await refusal(service.read(language_hints=["uk", "ja-JP"]))
    assert (code, reason) == ("INVALID_ARGUMENT", "UNKNOWN_LANGUAGE")
    assert "en, fr-FR, oc, pl" in message


async def test_settings_say_another_language(narrow: Service) -> None:
    assert (await narrow.read(language_hints=["cs"])).model == "polish"
    assert (await refusal(narrow.read(language_hints=["pl"])))[1] == "UNKNOWN_LANGUAGE"


# --- embeddings ---


def states_of(folder: Path, contents: list[bytes]) -> np.ndarray:
    """What the transformers library itself answers."""
    model = VisionEncoderDecoderModel.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    images = [Image.open(io.BytesIO(content)).convert("L") for content in contents]
    with torch.inference_mode():
        states: np.ndarray = model.encoder(processor(images, return_tensors="pt")["pixel_values"])[0].numpy()
    return states


def array(tensor: common_pb2.Tensor) -> np.ndarray:
    dtype = {common_pb2.TENSOR_TYPE_FLOAT32: "<f4", common_pb2.TENSOR_TYPE_FLOAT16: "<f2"}[tensor.dtype]
    return np.frombuffer(tensor.content, dtype).reshape(tuple(tensor.shape))


def embed(service: Service, contents: list[bytes], **fields: Any) -> Any:
    images = [common_pb2.Image(content=content) for content in contents]
    return service.stub.Embed(ocr_pb2.EmbedRequest(images=images, **fields))


async def test_embeddings_are_the_encoders_states(service: Service) -> None:
    contents = [png(seed) for seed in range(5)]
    wanted = states_of(service.folder / "default", contents)
    answer = await embed(service, contents, pooling=ocr_pb2.POOLING_NONE)
    assert answer.model == "default"
    np.testing.assert_allclose(array(answer.embeddings), wanted, atol=1e-4)
    mean = array((await embed(service, contents)).embeddings)
    np.testing.assert_allclose(mean, wanted.mean(axis=1), atol=1e-4)
    first = array((await embed(service, contents, pooling=ocr_pb2.POOLING_CLS)).embeddings)
    np.testing.assert_allclose(first, wanted[:, 0], atol=1e-4)
    half = array((await embed(service, contents, dtype=common_pb2.TENSOR_TYPE_FLOAT16)).embeddings)
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, mean, atol=2e-3)
    unit = array((await embed(service, contents, normalize=True)).embeddings)
    np.testing.assert_allclose(unit, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-5)


async def test_an_embedding_does_not_depend_on_its_company(service: Service) -> None:
    alone = [array((await embed(service, [png(seed)])).embeddings)[0] for seed in range(6)]
    together, *_ = await asyncio.gather(
        embed(service, [png(seed) for seed in range(6)]),
        *(service.read("default", seed=seed) for seed in range(8)),
        embed(service, [png(9)] * 3),
    )
    np.testing.assert_allclose(array(together.embeddings), alone, atol=1e-5)


async def test_embedding_loads_the_model_it_names(service: Service) -> None:
    await service.unload("french")
    answer = await embed(service, [png(1)], model="french")
    np.testing.assert_allclose(
        array(answer.embeddings), states_of(service.folder / "french", [png(1)]).mean(axis=1), atol=1e-4
    )


@pytest.mark.parametrize(
    ("contents", "fields", "code", "reason", "words"),
    [
        ([], {}, "INVALID_ARGUMENT", "INVALID_FIELD", "1 to 8"),
        ([png()] * 9, {}, "RESOURCE_EXHAUSTED", "TOO_MANY_IMAGES", "limit of 8"),
        ([png(), b""], {}, "INVALID_ARGUMENT", "IMAGE_EMPTY", "images[1].content"),
        ([png(), b"GIF89a"], {}, "INVALID_ARGUMENT", "IMAGE_NOT_RECOGNISED", "images[1].content"),
        ([png()], {"pooling": 77}, "INVALID_ARGUMENT", "INVALID_FIELD", "POOLING_NONE (3)"),
        ([png()], {"dtype": 5}, "INVALID_ARGUMENT", "INVALID_FIELD", "TENSOR_TYPE_FLOAT16 (2)"),
        ([png()], {"model": "nobody"}, "NOT_FOUND", "MODEL_NOT_FOUND", "default"),
    ],
)
async def test_unfit_embed_requests_are_refused(
    service: Service, contents: list[bytes], fields: dict[str, Any], code: str, reason: str, words: str
) -> None:
    got_code, got_reason, message = await refusal(embed(service, contents, **fields))
    assert (got_code, got_reason) == (code, reason)
    assert words in message


async def test_an_answer_larger_than_the_limit_is_refused_before_any_work(narrow: Service) -> None:
    small = png(size=(60, 30))
    # 17 states of 24 float32 numbers.
    assert (await embed(narrow, [small], pooling=ocr_pb2.POOLING_NONE)).embeddings.shape == [1, 17, 24]
    code, reason, message = await refusal(embed(narrow, [small] * 2, pooling=ocr_pb2.POOLING_NONE))
    assert (code, reason) == ("RESOURCE_EXHAUSTED", "EMBEDDING_TOO_LARGE")
    assert "3264 bytes" in message
    assert (await embed(narrow, [small] * 2)).embeddings.shape == [2, 24]


async def test_a_call_takes_only_so_many_pixels(narrow: Service) -> None:
    assert (await embed(narrow, [png()])).embeddings.shape == [1, 24]
    code, reason, _ = await refusal(embed(narrow, [png()] * 2))
    assert (code, reason) == ("RESOURCE_EXHAUSTED", "IMAGE_TOO_MANY_PIXELS")


async def test_a_cancelled_embed_leaves_nothing_in_the_engine(service: Service) -> None:
    call = embed(service, [png(seed) for seed in range(8)])
    await call.wait_for_connection()
    call.cancel()
    host = service.server.host
    assert host is not None
    async with asyncio.timeout(60):
        while host.admission.running_count or host.admission.waiting_count:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert (await embed(service, [png()])).embeddings.shape == [1, 24]
