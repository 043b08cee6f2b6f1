"""Which artifact a model is run from, and what is said when that cannot be."""

import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

from services.kit.engine_api import Accepted, Described, Failed, Finished, Raw, Update
from services.kit.faults import FaultData, Kind
from services.ocr.domain import LoadJob, ModelInfo, UnloadJob
from services.ocr.engine.main import OcrEngine, create_engine
from services.ocr.settings import Settings
from services.runtimes.artifacts.errors import Reason, StoreError
from services.runtimes.artifacts.store import Store, Stored, open_store
from services.runtimes.checkpoints import CheckpointError
from services.runtimes.graph_trocr import GraphTrocr
from services.runtimes.sessions.interface import SessionError
from tests.support import compiled_trocr, tiny_trocr
from tests.support.compiled_trocr import compiled, tied
from tests.support.reading import GREEDY, Reader, scribble

TIMEOUT_S = 60


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty one."""
    return open_store(str(tmp_path / "store"))


def publish(store: Store, runtime: str = "onnxruntime", **options: Any) -> Stored:
    shared = compiled(tied)
    return compiled_trocr.publish(store, shared.folder, shared.made, runtime, **options)


def engine_for(store: Store, folder: Path | None = None, **options: Any) -> OcrEngine:
    settings = Settings(
        models={"tiny": str(folder or compiled(tied).folder)},
        artifact_store=store.location,
        threads=1,
        read_documents=False,
        **options,
    )
    return create_engine(settings.model_dump_json())


def info(engine: OcrEngine) -> ModelInfo:
    (model,) = engine.info().models
    return model


def told(engine: OcrEngine, work: LoadJob | UnloadJob) -> list[Any]:
    """Everything that is said of the job, its end last."""
    woken = threading.Event()
    engine.on_wake(woken.set)
    engine.submit("job", Raw(msgspec.msgpack.encode(work)))
    events: list[Any] = []
    while not events or not isinstance(events[-1], Finished | Failed):
        woken.clear()
        events += [event for event in engine.step() if not isinstance(event, Described)]
        if not engine.busy and not (events and isinstance(events[-1], Finished | Failed)):
            assert woken.wait(TIMEOUT_S)
    assert isinstance(events[0], Accepted)
    return events[1:]


def load(engine: OcrEngine, **wanted: Any) -> ModelInfo:
    end = told(engine, LoadJob("tiny", **wanted))[-1]
    assert isinstance(end, Finished), end
    return msgspec.msgpack.decode(end.payload, type=ModelInfo)


def refused(engine: OcrEngine, **wanted: Any) -> FaultData:
    end = told(engine, LoadJob("tiny", **wanted))[-1]
    assert isinstance(end, Failed)
    return end.fault


# --- what is chosen ---


def test_without_artifacts_torch_runs_the_model(store: Store) -> None:
    assert (info(engine_for(store)).runtime, info(engine_for(store)).artifact) == ("torch", "")


def test_auto_takes_the_fastest_that_is_faster_than_torch(store: Store) -> None:
    publish(store, "onnxruntime", speed=0.8)
    assert info(engine_for(store)).runtime == "torch"
    fastest = publish(store, "openvino", speed=2.5)
    publish(store, "onnxruntime", speed=1.5)
    found = info(engine_for(store))
    assert (found.runtime, found.artifact) == ("openvino", fastest.id)
    assert info(engine_for(store, runtime="torch")).runtime == "torch"


def test_a_runtime_is_a_setting(store: Store) -> None:
    publish(store, "openvino", speed=2.5)
    publish(store, "onnxruntime", speed=0.5)
    assert info(engine_for(store, runtime="onnxruntime")).runtime == "onnxruntime"


def test_what_use_chose_comes_first(store: Store) -> None:
    publish(store, "openvino", speed=2.5)
    slow = publish(store, "onnxruntime", speed=0.5)
    store.use("tiny", slow.id)
    assert info(engine_for(store)).artifact == slow.id


def test_another_checkpoints_artifacts_do_not_count(store: Store, tmp_path: Path) -> None:
    theirs = publish(store, speed=2.5)
    other = tiny_trocr.save(tmp_path / "other", tiny_trocr.build(positions=160, seed=5))
    engine = engine_for(store, other)
    assert info(engine).runtime == "torch"
    fault = refused(engine, artifact=theirs.id)
    assert (fault.kind, fault.reason) == (Kind.FAILED_PRECONDITION, "ARTIFACT_UNUSABLE")
    assert "compile it again" in fault.message


# --- changing over while serving ---


def test_a_served_model_changes_its_runtime_and_loses_no_line(store: Store) -> None:
    stored = publish(store)
    engine = engine_for(store)
    reader = Reader(engine)
    alone = reader.submit("alone", scribble(2), GREEDY)
    reader.finish()
    reader.submit("under way", scribble(2), GREEDY)
    for _ in range(4):
        reader.step()
    found = load_beside(engine, reader, artifact=stored.id[:12])
    assert (found.runtime, found.artifact) == ("onnxruntime", stored.id)
    assert info(engine) == found
    after = reader.submit("after", scribble(2), GREEDY)
    reader.finish()
    assert reader.reads["under way"].ids == alone.ids == after.ids
    assert load(engine, runtime="torch").runtime == "torch"


def load_beside(engine: OcrEngine, reader: Reader, **wanted: Any) -> ModelInfo:
    """Load while lines are under way, whose events go to the reader."""
    woken = threading.Event()
    engine.on_wake(woken.set)
    engine.submit("load", Raw(msgspec.msgpack.encode(LoadJob("tiny", **wanted))))
    original = engine.step
    found: list[Any] = []

    def step() -> list[Any]:
        events = original()
        found.extend(e for e in events if isinstance(e, Finished | Failed) and e.job == "load")
        return [event for event in events if getattr(event, "job", "") != "load"]

    engine.step = step  # type: ignore[method-assign]
    while not found:
        woken.clear()
        reader.step()
        if not engine.busy and not found:
            assert woken.wait(TIMEOUT_S)
    engine.step = original  # type: ignore[method-assign]
    (end,) = found
    assert isinstance(end, Finished), end
    return msgspec.msgpack.decode(end.payload, type=ModelInfo)


def test_loading_what_is_loaded_so_tells_only_the_end(store: Store) -> None:
    stored = publish(store, speed=2.0)
    engine = engine_for(store)
    same: list[dict[str, Any]] = [{}, {"artifact": stored.id}, {"runtime": "onnxruntime"}, {"precision": "float32"}]
    for wanted in same:
        events = told(engine, LoadJob("tiny", **wanted))
        assert [type(event) for event in events] == [Finished]
    stages = told(engine, LoadJob("tiny", runtime="torch"))
    assert [type(event) for event in stages] == [Update, Update, Finished]


def test_use_is_followed_at_the_next_load(store: Store) -> None:
    engine = engine_for(store)
    stored = publish(store)
    assert load(engine).runtime == "torch"
    store.use("tiny", stored.id)
    assert load(engine).artifact == stored.id
    store.unuse("tiny")
    assert load(engine).runtime == "torch"


def test_an_artifact_in_use_is_held_until_it_is_let_go(store: Store) -> None:
    stored = publish(store)
    engine = engine_for(store, runtime="onnxruntime")
    with pytest.raises(StoreError) as raised:
        store.delete(stored.id)
    assert raised.value.reason is Reason.IN_USE
    assert "OCR service, model tiny" in str(raised.value)
    told(engine, UnloadJob("tiny"))
    store.delete(stored.id)
    assert not store.find()


def test_an_artifact_needs_nothing_of_the_checkpoint_but_to_know_it(store: Store) -> None:
    """Configuration, tokenizer and image processor come with it."""
    stored = publish(store)
    names = {path.name for path in (store.local_folder(stored.id) / stored.manifest.model_folder).iterdir()}
    assert names == {path.name for path in compiled(tied).folder.iterdir()} - {"model.safetensors"}


def test_memory_is_what_the_artifact_says(store: Store) -> None:
    stored = publish(store)
    size = stored.manifest.weight_bytes
    engine = engine_for(store, memory_limit_bytes=size, runtime="onnxruntime")
    assert info(engine).weight_bytes == size
    with pytest.raises(CheckpointError, match="memory_limit_bytes"):
        engine_for(store, memory_limit_bytes=size - 1, runtime="onnxruntime")


# --- refusals ---


def test_a_runtime_without_an_artifact_says_how_to_make_one(store: Store) -> None:
    engine = engine_for(store)
    fault = refused(engine, runtime="openvino")
    assert (fault.kind, fault.reason) == (Kind.FAILED_PRECONDITION, "ARTIFACT_UNUSABLE")
    assert "inkwell compile tiny --to openvino" in fault.message
    assert info(engine).runtime == "torch"  # it goes on


def test_an_artifact_that_there_is_not_is_not_found(store: Store) -> None:
    fault = refused(engine_for(store), artifact="0" * 64)
    assert (fault.kind, fault.reason) == (Kind.NOT_FOUND, "ARTIFACT_NOT_FOUND")
    assert fault.fields[0].field == "artifact"


def test_what_is_asked_besides_an_artifact_has_to_agree_with_it(store: Store) -> None:
    stored = publish(store)
    engine = engine_for(store)
    for field, value in (("precision", "bfloat16"), ("runtime", "openvino")):
        fault = refused(engine, artifact=stored.id, **{field: value})
        assert fault.kind is Kind.INVALID_ARGUMENT
        assert fault.fields[0].field == field


def test_torch_does_not_compute_four_bits(store: Store) -> None:
    fault = refused(engine_for(store), precision="int4_weight_only")
    assert (fault.kind, fault.reason) == (Kind.FAILED_PRECONDITION, "ARTIFACT_NEEDED")
    assert "inkwell compile tiny" in fault.message


def test_a_broken_artifact_is_named_and_the_model_goes_on(store: Store) -> None:
    stored = publish(store)
    (store.local_folder(stored.id) / "decoder.onnx").write_bytes(b"broken")
    engine = engine_for(store)
    fault = refused(engine, artifact=stored.id)
    assert (fault.kind, fault.reason) == (Kind.FAILED_PRECONDITION, "ARTIFACT_UNUSABLE")
    assert "decoder.onnx" in fault.message
    assert info(engine).runtime == "torch"
    # Nothing of the attempt holds it.
    store.delete(stored.id)


def test_a_store_that_cannot_be_read_matters_only_where_it_is_asked_for(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    store = open_store(str(blocked / "store"))
    engine = engine_for(store)
    assert info(engine).runtime == "torch"
    fault = refused(engine, runtime="onnxruntime")
    assert fault.kind in (Kind.FAILED_PRECONDITION, Kind.UNAVAILABLE)


def test_a_runtime_that_fails_ends_the_lines_in_it_and_nothing_else(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store)
    engine = engine_for(store, runtime="onnxruntime")
    reader = Reader(engine)
    read = reader.submit("lost", scribble(1), GREEDY)
    for _ in range(3):
        reader.step()
    desk = engine.shelf.desks["tiny"]
    networks = desk.lane.model.networks
    assert isinstance(networks, GraphTrocr)

    def gone(*_: object) -> None:
        raise SessionError("the server is gone")

    with monkeypatch.context() as patch:
        patch.setattr(networks._decoder, "run", gone)
        reader.finish()
    assert read.failed is not None
    assert (read.failed.fault.kind, read.failed.fault.reason) == (Kind.UNAVAILABLE, "RUNTIME_FAILED")
    assert desk.lane.rows_in_use == 0
    again = reader.submit("again", scribble(1), GREEDY)
    reader.finish()
    assert again.recognition is not None
