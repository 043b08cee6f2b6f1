"""OCR through a Triton server: the same texts under the same continuous batch, with graphs that run elsewhere."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from services.compiler.targets import triton
from services.compiler.targets.triton import BuiltGraph, RepositoryOptions
from services.kit.faults import Kind
from services.ocr.engine.main import OcrEngine, create_engine
from services.ocr.settings import Settings
from services.runtimes.artifacts.digests import digest_of
from services.runtimes.artifacts.manifest import BuiltOn, Graph, Manifest, Requires
from services.runtimes.artifacts.store import open_store
from tests.support import artifacts
from tests.support.compiled_trocr import compiled, tied
from tests.support.reading import GREEDY, Read, Reader, beams, scribble
from tests.support.triton_server import TritonServer

LINES = [scribble(seed) for seed in range(6)]


@dataclass
class Trial:
    """A checkpoint, and a store that holds its artifact for Triton."""

    checkpoint: Path
    store: str
    repository: Path


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    checkpoint, made = compiled(tied).folder, compiled(tied).made
    store = open_store(str(tmp_path_factory.mktemp("triton") / "store"))
    staging = store.staging()
    built = [
        BuiltGraph(Graph(each.component, "", each.inputs, each.outputs, each.axes, 0), each.file, each.example)
        for each in made.graphs
    ]
    graphs = triton.write_repository(built, staging, "cpu", RepositoryOptions("tiny-", "float32"))
    for file in made.helper_files:
        (staging / "model" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint / file, staging / "model" / file)
    manifest: Manifest = artifacts.manifest(
        model="tiny",
        source=str(checkpoint),
        source_digest=digest_of(checkpoint),
        recipe="triton",
        target="triton",
        precision="float32",
        graphs=graphs,
        model_folder="model",
        built_on=BuiltOn("cpu", "some CPU", (), {}),
        requires=Requires(),
        details=made.details,
    )
    stored = store.publish(staging, manifest)
    return Trial(checkpoint, store.location, store.local_folder(stored.id) / "repository")


@pytest.fixture
def server(trial: Trial) -> Iterator[TritonServer]:
    with TritonServer(trial.repository) as serving:
        yield serving


def engine(trial: Trial, runtime: str, address: str = "", *, shared_memory: bool = False) -> OcrEngine:
    settings = Settings(
        models={"tiny": str(trial.checkpoint)},
        artifact_store=trial.store,
        runtime=runtime,
        triton_address=address,
        triton_shared_memory=shared_memory,
        threads=1,
        read_documents=False,
        detect_blank=False,
    )
    return create_engine(settings.model_dump_json())


def read_all(engine: OcrEngine) -> list[Read]:
    """Greedy and beams in one batch, the later lines joining while the first are under way."""
    reader = Reader(engine)
    reads = []
    for number, line in enumerate(LINES):
        if number >= len(LINES) // 2:
            for _ in range(3):
                reader.step()
        reads.append(reader.submit(str(number), line, beams(3) if number % 2 else GREEDY))
    reader.finish()
    return reads


@pytest.mark.parametrize("shared_memory", [False, True], ids=["bytes", "shared-memory"])
def test_lines_read_through_triton_equal_torchs(trial: Trial, server: TritonServer, shared_memory: bool) -> None:
    ours = read_all(engine(trial, "triton", server.address, shared_memory=shared_memory))
    assert [read.ids for read in ours] == [read.ids for read in read_all(engine(trial, "torch"))]
    assert server.models["tiny-decoder"].calls > 0
    assert bool(server.regions) == shared_memory


def test_a_server_that_fails_ends_the_lines_and_not_the_engine(trial: Trial, server: TritonServer) -> None:
    reading = engine(trial, "triton", server.address)
    expected = [read.ids for read in read_all(reading)]
    server.refuse = [grpc.StatusCode.INTERNAL]
    failures = [read.failed for read in read_all(reading) if read.failed]
    assert failures
    assert all("INTERNAL: refused for the test" in failure.fault.message for failure in failures)
    assert all(failure.fault.kind is Kind.UNAVAILABLE for failure in failures)
    assert [read.ids for read in read_all(reading)] == expected
