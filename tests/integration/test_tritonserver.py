"""NVIDIA's own tritonserver serves what the compiler writes, and the `triton` runtime runs on it.

See tests/support/nvidia_tritonserver.py for what of it is NVIDIA's. Skipped unless it is installed: make test-triton.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from services.compiler.export import trocr
from services.compiler.export.exported import ExportedGraph
from services.compiler.targets import triton
from services.compiler.targets.triton import BuiltGraph, RepositoryOptions
from services.runtimes.artifacts.manifest import Graph
from services.runtimes.hardware import Hardware
from services.runtimes.sessions.interface import SessionError, SessionOptions
from services.runtimes.sessions.triton_session import TritonSession
from tests.support import nvidia_tritonserver, small_graphs

pytestmark = pytest.mark.skipif(bool(nvidia_tritonserver.missing()), reason=nvidia_tritonserver.missing())
MODEL = Path(__file__).parents[2] / "models" / "handwriting-tiny"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExportedGraph]:
    graphs = trocr.export(MODEL, tmp_path_factory.mktemp("exported"), lambda note: None, max_batch_size=8).graphs
    return {graph.component: graph for graph in graphs}


@pytest.fixture(scope="module")
def repository(exported: dict[str, ExportedGraph], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, small = tmp_path_factory.mktemp("artifact"), tmp_path_factory.mktemp("small")
    built = [
        BuiltGraph(Graph(name, "", graph.inputs, graph.outputs, graph.axes, 0), graph.file, graph.example)
        for name, graph in exported.items()
    ]
    triton.write_repository(built, folder, "cpu", RepositoryOptions("handwriting-tiny-", "float32"))
    small_ones = [small_graphs.encoder(small), small_graphs.decoder(small), small_graphs.denoiser(small)]
    triton.write_repository(small_ones, folder, "cpu", RepositoryOptions("small-", "float32"))
    return folder / triton.REPOSITORY


@pytest.fixture(scope="module")
def address(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """That it starts at all is the first test: it reads every config.pbtxt and runs every warmup, or ends."""
    with nvidia_tritonserver.serving(repository, tmp_path_factory.mktemp("backends")) as where:
        yield where


@pytest.fixture(params=[False, True], ids=["bytes", "shared-memory"])
def options(address: str, request: pytest.FixtureRequest) -> SessionOptions:
    hardware = Hardware("cpu", "cpu", "CPU", 0, 1)
    return SessionOptions(hardware, triton_address=address, triton_shared_memory=request.param)


@pytest.mark.parametrize("component", ["encoder", "decoder"])
def test_an_exported_model_computes_what_torch_computes(
    exported: dict[str, ExportedGraph], repository: Path, options: SessionOptions, component: str
) -> None:
    graph = exported[component]
    session = TritonSession(repository / f"handwriting-tiny-{component}" / "1" / "model.onnx", options)
    assert session.inputs == graph.inputs
    assert session.outputs == graph.outputs
    feeds = graph.example({axis.name: min(3, axis.high) for axis in graph.axes})
    expected = graph.reference(feeds)
    for name, tensor in session.run(feeds).items():
        assert torch.allclose(tensor, expected[name], atol=2e-4), name
    session.close()


def test_scalars_caches_that_are_empty_and_full_batches(repository: Path, options: SessionOptions) -> None:
    unet = TritonSession(repository / "small-unet" / "1" / "model.onnx", options)
    assert unet.run({"sample": torch.ones(2, 4), "timestep": torch.tensor(3.0)})["noise"].tolist() == [[3.0] * 4] * 2
    unet.close()
    decoder = TritonSession(repository / "small-decoder" / "1" / "model.onnx", options)
    feeds = {"tokens": torch.arange(3), "cross": torch.ones(2, 4), "places": torch.tensor([0, 1, 1])}
    for length in (0, 1, 32):
        new = decoder.run({**feeds, "past": torch.ones(3, length)})["new"]
        assert new[:, 0].tolist() == [length + 1.0, length + 2.0, length + 3.0]
    decoder.close()


def test_a_batch_beyond_the_configuration_is_refused(repository: Path, options: SessionOptions) -> None:
    session = TritonSession(repository / "small-encoder" / "1" / "model.onnx", options)
    with pytest.raises(SessionError, match="batch-size must be <= 8"):
        session.run({"pixels": torch.ones(9, 4, 5), "weight": torch.ones(9, 1, 1)})
    session.close()


def test_callers_at_the_same_time_get_their_own_rows(repository: Path, options: SessionOptions) -> None:
    """Triton may put them into one batch."""

    def ask(number: int) -> torch.Tensor:
        session = TritonSession(repository / "small-encoder" / "1" / "model.onnx", options)
        result = session.run({"pixels": torch.full((1, 4, 5), float(number)), "weight": torch.ones(1, 1, 1)})
        session.close()
        return result["states"]

    with ThreadPoolExecutor(4) as pool:
        for number, states in enumerate(pool.map(ask, range(8))):
            assert torch.equal(states, torch.full((1, 4, 5), float(number)))


def test_a_model_that_is_not_there_lists_those_that_are(repository: Path, options: SessionOptions) -> None:
    with pytest.raises(SessionError, match="has no such model; it has handwriting-tiny-decoder, handwriting-tiny-enc"):
        TritonSession(repository / "other" / "1" / "model.onnx", replace(options))
