"""Embedding pictures, and loading and unloading models, with both clients."""

import builtins
import io
from pathlib import Path
from typing import Any

import pytest

import inkwell
from inkwell.diffusion.v1 import diffusion_pb2
from inkwell.ocr.v1 import ocr_pb2
from tests.unit.inkwell.fake_server import TIMEOUT_S, InkwellServer
from tests.unit.inkwell.test_aio_client import set_event

# --- embedding -----------------------------------------------------------------------------------------------------


def test_embeddings_are_rows_in_the_order_of_the_pictures(client: inkwell.Client, tmp_path: Path) -> None:
    (tmp_path / "line.png").write_bytes(b"four")
    got = client.embed([b"a", tmp_path / "line.png"])
    assert (got.shape, got.dtype, got.model) == ((2, 4), "float32", "pen")
    assert got.tolist() == [[1, 1.25, 1.5, 1.75], [4, 4.25, 4.5, 4.75]]
    assert got.timing == inkwell.Timing(0.5, 2)
    assert got.served_by.pool == "pool-a"


@pytest.mark.parametrize("one", [b"a", bytearray(b"a"), memoryview(b"a")])
def test_one_picture_is_one_row(client: inkwell.Client, one: bytes) -> None:
    assert client.embed(one).shape == (1, 4)


def test_one_path_is_one_row(client: inkwell.Client, tmp_path: Path) -> None:
    (tmp_path / "line.png").write_bytes(b"four")
    assert client.embed(str(tmp_path / "line.png")).tolist() == [[4, 4.25, 4.5, 4.75]]
    assert client.embed(tmp_path / "line.png").shape == (1, 4)


def test_without_pooling_every_token_has_its_vector(client: inkwell.Client) -> None:
    got = client.embed([b"a", b"bb"], pooling="none", dtype="float16")
    assert (got.shape, got.dtype, len(got.content)) == ((2, 3, 4), "float16", 48)
    assert got.tolist()[1] == [[2, 2.25, 2.5, 2.75], [3, 3.25, 3.5, 3.75], [4, 4.25, 4.5, 4.75]]


def test_what_is_asked_for_is_sent(client: inkwell.Client, server: InkwellServer) -> None:
    client.embed(b"a")
    client.embed(b"a", model="m", pooling="cls", dtype="float16", normalize=True)
    plain, full = server.requests
    assert (plain.pooling, plain.normalize, plain.model) == (ocr_pb2.POOLING_MEAN, False, "")
    assert (full.pooling, full.normalize, full.model) == (ocr_pb2.POOLING_CLS, True, "m")


@pytest.mark.parametrize(("option", "says"), [("pooling", "mean, cls, none"), ("dtype", "float32, float16")])
def test_what_there_is_not_is_refused_by_name(
    client: inkwell.Client, server: InkwellServer, option: str, says: str
) -> None:
    with pytest.raises(inkwell.InvalidRequest, match=says) as raised:
        client.embed(b"a", **{option: "max"})  # type: ignore[arg-type]
    assert raised.value.fields[0].field == option
    assert not server.requests


def test_a_tensor_that_is_none_is_the_servers_fault(client: inkwell.Client) -> None:
    with pytest.raises(inkwell.InternalError, match="shape") as raised:
        client.embed(b"a", model="torn")
    assert raised.value.reason == "BAD_TENSOR"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("pooling", ["mean", "none"])
def test_arrays_and_files_hold_the_same_numbers(
    client: inkwell.Client, tmp_path: Path, dtype: str, pooling: str
) -> None:
    numpy = pytest.importorskip("numpy")
    got = client.embed([b"a", b"bb"], dtype=dtype, pooling=pooling)
    array = got.numpy()
    assert (array.shape, array.dtype.name) == (got.shape, dtype)
    assert array.tolist() == got.tolist()
    loaded = numpy.load(got.save(tmp_path / "lines.npy"), allow_pickle=False)
    assert (loaded.dtype, loaded.tolist()) == (array.dtype, got.tolist())
    # Bytes and shape are enough for any other library.
    assert numpy.frombuffer(got.content, dtype=array.dtype).reshape(got.shape).tolist() == got.tolist()
    theirs = io.BytesIO()
    numpy.save(theirs, array)
    assert len(got.npy()) == len(theirs.getvalue())


def test_without_numpy_only_arrays_are_missing(client: inkwell.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name == "numpy":
            raise ImportError("no numpy here")
        return usual(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    got = client.embed(b"a")
    assert got.tolist() == [[1, 1.25, 1.5, 1.75]]
    assert got.npy().startswith(b"\x93NUMPY")
    with pytest.raises(ImportError):
        got.numpy()


# --- loading -------------------------------------------------------------------------------------------------------


def test_loading_answers_the_model(client: inkwell.Client, server: InkwellServer) -> None:
    model = client.load_model("pen", precision="int8-weight-only")
    assert (model.name, model.state) == ("pen", inkwell.ModelState.READY)
    assert model.precision is inkwell.Precision.INT8_WEIGHT_ONLY
    assert client.load_model("pen", precision=inkwell.Precision.FLOAT16).precision == "float16"
    assert client.load_model("pen").precision == "float32"
    assert server.requests[-1].precision == ocr_pb2.PRECISION_UNSPECIFIED
    compiled = client.load_model("pen", artifact="0123456789ab", runtime="openvino")
    assert (compiled.artifact, compiled.runtime) == ("0123456789ab", "openvino")


def test_loading_tells_its_stages(client: inkwell.Client) -> None:
    seen: list[inkwell.LoadEvent] = []
    client.load_model("pen", on_event=seen.append)
    assert seen[:3] == [
        inkwell.LoadProgress(1, inkwell.LoadStage.WAITING, ()),
        inkwell.LoadProgress(2, inkwell.LoadStage.READING_WEIGHTS, ("old", "older")),
        inkwell.LoadProgress(4, inkwell.LoadStage.WARMING, ()),
    ]
    assert isinstance(seen[3], inkwell.LoadResult)
    assert (seen[3].model.name, seen[3].elapsed_ms) == ("pen", 1234)
    assert list(client.load_model_stream("pen")) == seen


def test_unloading_answers_the_model(client: inkwell.Client) -> None:
    model = client.unload_model("pen")
    assert (model.state, model.precision) == (inkwell.ModelState.UNLOADED, None)


def test_a_model_that_there_is_not(client: inkwell.Client, server: InkwellServer) -> None:
    with pytest.raises(inkwell.NotFound, match="pen"):
        client.load_model("nothing")
    with pytest.raises(inkwell.NotFound, match="pen"):
        client.unload_model("nothing")
    with pytest.raises(inkwell.InvalidRequest, match="float32, bfloat16") as raised:
        client.load_model("pen", precision="int4")
    assert raised.value.fields[0].field == "precision"
    assert len(server.requests) == 2


def test_a_model_that_paints_is_loaded_and_unloaded_where_that_is_said(
    client: inkwell.Client, server: InkwellServer
) -> None:
    seen: list[inkwell.LoadEvent] = []
    model = client.load_model("brush", service="diffusion", on_event=seen.append)
    assert isinstance(model, inkwell.DiffusionModel)
    assert (model.name, model.state, model.memory_bytes) == ("brush", inkwell.ModelState.READY, 18_000_000)
    assert seen == [
        inkwell.LoadProgress(1, inkwell.LoadStage.WAITING, ()),
        inkwell.LoadProgress(2, inkwell.LoadStage.READING_WEIGHTS, ("old",)),
        inkwell.LoadProgress(4, inkwell.LoadStage.WARMING, ()),
        inkwell.LoadResult(5, model, 0),
    ]
    unloaded = client.unload_model("brush", service="diffusion")
    assert (unloaded.state, unloaded.memory_bytes) == (inkwell.ModelState.UNLOADED, 0)
    assert [type(each) for each in server.requests] == [
        diffusion_pb2.LoadModelRequest,
        diffusion_pb2.UnloadModelRequest,
    ]
    with pytest.raises(inkwell.NotFound, match="pen"):  # no guessing: models that read are meant
        client.load_model("brush")


def test_stages_have_the_same_numbers_in_both_services() -> None:
    ours: dict[str, int] = dict(ocr_pb2.LoadStage.items())
    theirs: dict[str, int] = dict(diffusion_pb2.LoadStage.items())
    assert ours == theirs


@pytest.mark.parametrize(
    ("options", "field"),
    [({"service": "gateway"}, "service"), ({"service": "diffusion", "precision": "float16"}, "precision")],
)
def test_what_no_service_can_load_is_refused_by_name(
    client: inkwell.Client, server: InkwellServer, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(inkwell.InvalidRequest) as raised:
        client.load_model("brush", **options)
    assert raised.value.fields[0].field == field
    assert not server.requests


def test_closing_the_iterator_ends_the_waiting(client: inkwell.Client, server: InkwellServer) -> None:
    events = client.load_model_stream("hold")
    next(events)
    assert server.held.wait(TIMEOUT_S)
    events.close()
    assert server.cancelled.wait(TIMEOUT_S)


async def test_the_asyncio_client_does_the_same(
    aio_client: inkwell.AsyncClient, client: inkwell.Client, server: InkwellServer
) -> None:
    assert await aio_client.embed([b"a", b"bb"], dtype="float16") == client.embed([b"a", b"bb"], dtype="float16")
    assert (await aio_client.embed(b"a")).shape == (1, 4)
    assert await aio_client.load_model("pen") == client.load_model("pen")
    assert [event async for event in aio_client.load_model_stream("pen")] == list(client.load_model_stream("pen"))
    assert await aio_client.unload_model("pen") == client.unload_model("pen")
    loaded = client.load_model("brush", service="diffusion")
    assert await aio_client.load_model("brush", service="diffusion") == loaded
    unloaded = client.unload_model("brush", service="diffusion")
    assert await aio_client.unload_model("brush", service="diffusion") == unloaded
    assert await aio_client.adapters() == client.adapters()
    assert await aio_client.controls() == client.controls()
    events = aio_client.load_model_stream("hold")
    await anext(events)
    await set_event(server.held)
    await events.aclose()
    await set_event(server.cancelled)
