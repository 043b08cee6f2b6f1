"""The `triton` runtime against a real server of Triton's protocol."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch

from services.compiler.targets import triton
from services.compiler.targets.triton import BuiltGraph, RepositoryOptions
from services.runtimes.artifacts.manifest import Port
from services.runtimes.hardware import Hardware
from services.runtimes.sessions import triton_session
from services.runtimes.sessions.interface import SessionError, SessionOptions
from services.runtimes.sessions.triton_memory import byte_size
from services.runtimes.sessions.triton_session import TritonSession
from tests.support import small_graphs
from tests.support.triton_server import TritonServer

OPTIONS = SessionOptions(Hardware("cpu", "cpu", "CPU", 0, 1))


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files of a repository, by component."""
    source, artifact = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("artifact")
    built = [small_graphs.encoder(source), small_graphs.decoder(source), small_graphs.denoiser(source)]
    built += [small_graphs.identity(source, dtype) for dtype in ("float16", "int64", "bool")]
    written = triton.write_repository(built, artifact, "cpu", RepositoryOptions("small-", "float32"))
    return {graph.component: artifact / graph.file for graph in written}


@pytest.fixture
def server(graphs: dict[str, Path]) -> Iterator[TritonServer]:
    with TritonServer(repository_of(graphs)) as serving:
        yield serving


def repository_of(graphs: dict[str, Path]) -> Path:
    return graphs["encoder"].parent.parent.parent


@pytest.fixture(params=[False, True], ids=["bytes", "shared-memory"])
def options(request: pytest.FixtureRequest, server: TritonServer) -> SessionOptions:
    return replace(OPTIONS, triton_address=server.address, triton_shared_memory=request.param)


def test_ports_keep_the_names_of_their_axes(graphs: dict[str, Path], options: SessionOptions) -> None:
    session = TritonSession(graphs["decoder"], options)
    assert {port.name: port.shape for port in session.inputs} == {
        "tokens": ("rows",),
        "past": ("rows", "past"),
        "cross": ("images", 4),
        "places": ("rows",),
    }
    assert [(port.name, port.dtype, port.shape) for port in session.outputs] == [("new", "float32", ("rows", 4))]
    session.close()


def test_graphs_compute_what_they_compute_elsewhere(graphs: dict[str, Path], options: SessionOptions) -> None:
    session = TritonSession(graphs["encoder"], options)
    pixels = torch.randn(3, 4, 5)
    result = session.run({"pixels": pixels, "weight": torch.full((3, 1, 1), 2.0)})
    assert torch.equal(result["states"], pixels.relu())
    assert torch.equal(result["scaled"], pixels.relu() * 2)
    result["states"].zero_()  # the caller's own, and writable
    only = session.run({"pixels": pixels, "weight": torch.ones(3, 1, 1)}, ["scaled"])
    assert list(only) == ["scaled"]
    session.close()


def test_caches_grow_from_nothing(graphs: dict[str, Path], options: SessionOptions) -> None:
    session = TritonSession(graphs["decoder"], options)
    for length in range(32):
        feeds = {
            "tokens": torch.arange(3),
            "past": torch.ones(3, length),
            "cross": torch.tensor([[10.0] * 4, [20.0] * 4]),
            "places": torch.tensor([0, 1, 1]),
        }
        new = session.run(feeds)["new"]
        assert new[:, 0].tolist() == [length + 10.0, length + 21.0, length + 22.0]
    session.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.bool])
def test_every_type_comes_back_as_it_went(graphs: dict[str, Path], options: SessionOptions, dtype: torch.dtype) -> None:
    session = TritonSession(graphs[f"identity-{str(dtype)[6:]}"], options)
    sent = torch.tensor([1, 0, 3]).to(dtype)
    back = session.run({"in": sent})["out"]
    assert back.dtype == dtype
    assert torch.equal(back, sent)
    session.close()


def test_bfloat16_keeps_its_bits(tmp_path: Path) -> None:
    """Triton's onnxruntime backend has no bfloat16, its TensorRT backend has: the protocol is the same."""
    source = tmp_path / "bf16"
    source.mkdir()
    artifact = tmp_path / "bf16-artifact"
    built = small_graphs.identity(source, "float16")
    (graph,) = triton.write_repository([built], artifact, "cpu", RepositoryOptions("", "float32"))
    (artifact / graph.file).unlink()
    half = small_graphs.identity(source, "bfloat16")
    half.file.rename(artifact / graph.file)
    config = (artifact / graph.file).parent.parent / "config.pbtxt"
    text = config.read_text().replace("FP16", "BF16").replace('\\"float16\\"', '\\"bfloat16\\"')
    config.write_text(text[: text.index("model_warmup")] + 'backend: "onnxruntime"\n')
    with TritonServer(artifact / "repository") as serving:
        for shared in (False, True):
            options = replace(OPTIONS, triton_address=serving.address, triton_shared_memory=shared)
            session = TritonSession(artifact / graph.file, options)
            sent = torch.tensor([1.0, -2.5, 3e38]).bfloat16()
            back = session.run({"in": sent})["out"]
            assert back.dtype == torch.bfloat16
            assert torch.equal(back.view(torch.int16), sent.view(torch.int16))
            session.close()


def test_scalars_go_through_a_protocol_that_has_none(graphs: dict[str, Path], options: SessionOptions) -> None:
    session = TritonSession(graphs["unet"], options)
    result = session.run({"sample": torch.ones(2, 4), "timestep": torch.tensor(3.0)})
    assert result["noise"].tolist() == [[3.0] * 4] * 2
    session.close()


@pytest.mark.parametrize(
    ("feeds", "told"),
    [
        ({"pixels": torch.ones(9, 4, 5), "weight": torch.ones(9, 1, 1)}, "batch of at most 8"),
        (
            {"pixels": torch.ones(1, 3, 5), "weight": torch.ones(1, 1, 1)},
            r"input pixels has shape \[1, 3, 5\], wanted is \[images=1, 4, width\]",
        ),
        ({"pixels": torch.ones(1, 4, 5)}, "small-encoder: input weight is missing; its inputs are pixels, weight"),
        ({"pixels": torch.ones(1, 4, 5).double(), "weight": torch.ones(1)}, "has dtype float64, wanted is float32"),
    ],
)
def test_inputs_that_do_not_fit_are_named(
    graphs: dict[str, Path], options: SessionOptions, feeds: dict[str, torch.Tensor], told: str
) -> None:
    session = TritonSession(graphs["encoder"], options)
    with pytest.raises(SessionError, match=told):
        session.run(feeds)
    session.close()


def test_no_server_says_where_it_was_looked_for(graphs: dict[str, Path], server: TritonServer) -> None:
    server.stop()
    with pytest.raises(SessionError, match=rf"Triton at {server.address} cannot be asked: UNAVAILABLE: .*8001"):
        TritonSession(graphs["encoder"], replace(OPTIONS, triton_address=server.address))


def test_without_an_address_the_setting_is_named(graphs: dict[str, Path]) -> None:
    with pytest.raises(SessionError, match="takes the address of a Triton server"):
        TritonSession(graphs["encoder"], OPTIONS)


def test_a_server_that_still_loads_is_told_from_one_that_is_gone(graphs: dict[str, Path], server: TritonServer) -> None:
    server.ready = False
    with pytest.raises(SessionError, match="is up and not ready"):
        TritonSession(graphs["encoder"], replace(OPTIONS, triton_address=server.address))


def test_a_model_that_is_not_there_lists_those_that_are(graphs: dict[str, Path], server: TritonServer) -> None:
    del server.models["small-unet"]
    with pytest.raises(SessionError, match="has no such model; it has small-decoder, small-encoder"):
        TritonSession(graphs["unet"], replace(OPTIONS, triton_address=server.address))


def test_another_build_of_the_same_name_is_refused(
    graphs: dict[str, Path], server: TritonServer, tmp_path: Path
) -> None:
    unet = small_graphs.denoiser(tmp_path)
    other = BuiltGraph(unet.graph, small_graphs.identity(tmp_path, "float32").file, unet.example)
    (graph,) = triton.write_repository([other], tmp_path / "others", "cpu", RepositoryOptions("small-", "float32"))
    with pytest.raises(SessionError, match="serves another build"):
        TritonSession(tmp_path / "others" / graph.file, replace(OPTIONS, triton_address=server.address))


def test_a_server_that_is_away_for_a_moment_is_asked_again(
    graphs: dict[str, Path], options: SessionOptions, server: TritonServer
) -> None:
    session = TritonSession(graphs["unet"], options)
    server.refuse = [grpc.StatusCode.UNAVAILABLE] * 2
    result = session.run({"sample": torch.ones(1, 4), "timestep": torch.tensor(2.0)})
    assert result["noise"].tolist() == [[2.0] * 4]
    assert server.refuse == []
    session.close()


def test_any_other_failure_is_not_asked_again(
    graphs: dict[str, Path], options: SessionOptions, server: TritonServer
) -> None:
    session = TritonSession(graphs["unet"], options)
    server.refuse = [grpc.StatusCode.INTERNAL, grpc.StatusCode.INTERNAL]
    with pytest.raises(SessionError, match="INTERNAL: refused for the test"):
        session.run({"sample": torch.ones(1, 4), "timestep": torch.tensor(2.0)})
    assert len(server.refuse) == 1
    session.close()


def test_a_server_that_does_not_answer_in_time_is_given_up(
    graphs: dict[str, Path], options: SessionOptions, server: TritonServer
) -> None:
    session = TritonSession(graphs["unet"], replace(options, triton_timeout_s=0.2))
    server.go.clear()
    with pytest.raises(SessionError, match="DEADLINE_EXCEEDED: no answer within 0.2 seconds"):
        session.run({"sample": torch.ones(1, 4), "timestep": torch.tensor(2.0)})
    server.go.set()
    session.close()


def test_a_server_that_is_started_anew_is_used_again(
    graphs: dict[str, Path], options: SessionOptions, server: TritonServer, tmp_path: Path
) -> None:
    session = TritonSession(graphs["unet"], options)
    feeds = {"sample": torch.ones(1, 4), "timestep": torch.tensor(2.0)}
    session.run(feeds)
    server.stop()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(session.run, feeds)
        with TritonServer(repository_of(graphs), server.port):
            assert asked.result()["noise"].tolist() == [[2.0] * 4]
    session.close()


def test_more_than_a_message_holds_is_refused_before_it_is_sent(
    graphs: dict[str, Path], server: TritonServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_session, "_MOST_BYTES", 100)
    session = TritonSession(graphs["encoder"], replace(OPTIONS, triton_address=server.address))
    with pytest.raises(SessionError, match="take 324 bytes, and one gRPC message holds 100"):
        session.run({"pixels": torch.ones(1, 4, 20), "weight": torch.ones(1, 1, 1)})
    assert server.models["small-encoder"].calls == 0
    session.close()


def test_shared_memory_leaves_nothing_behind(graphs: dict[str, Path], server: TritonServer) -> None:
    before = set(Path("/dev/shm").glob("inkwell-*"))
    session = TritonSession(
        graphs["encoder"], replace(OPTIONS, triton_address=server.address, triton_shared_memory=True)
    )
    session.run({"pixels": torch.ones(1, 4, 20), "weight": torch.ones(1, 1, 1)})
    # Already while it is in use: a killed process cannot clean up.
    assert set(Path("/dev/shm").glob("inkwell-*")) == before
    assert len(server.regions) == 2
    session.close()
    assert server.regions == {}


def test_a_repository_of_others_gets_ports_from_the_servers_metadata(tmp_path: Path) -> None:
    built = small_graphs.encoder(tmp_path)
    (graph,) = triton.write_repository([built], tmp_path, "cpu", RepositoryOptions("", "float32"))
    config = tmp_path / "repository" / "encoder" / "config.pbtxt"
    text = config.read_text()
    start, end = text.index("parameters {"), text.index("model_warmup")
    config.write_text(text[:start] + text[end:])
    with TritonServer(tmp_path / "repository") as serving:
        options = replace(OPTIONS, triton_address=serving.address)
        session = TritonSession(tmp_path / graph.file, options)
        assert session.inputs[0].shape == ("pixels.0", 4, "pixels.2")
        assert session.run({"pixels": torch.ones(1, 4, 2), "weight": torch.ones(1, 1, 1)})["states"].sum() == 8
        session.close()


def test_sizes_of_outputs_are_known_from_the_inputs_where_they_can_be() -> None:
    assert byte_size(Port("a", "float32", ("rows", 4)), {"rows": 3}) == 48
    assert byte_size(Port("a", "float16", ("rows", "past + 1")), {"rows": 2, "past": 3}) == 16
    assert byte_size(Port("a", "float32", ("8*height", "(width//8)")), {"height": 2, "width": 64}) == 16 * 8 * 4
    assert byte_size(Port("a", "int64", ()), {}) == 8
    assert byte_size(Port("a", "int64", ("max(rows, 2)",)), {"rows": 3}) is None
    assert byte_size(Port("a", "float32", ("found",)), {"rows": 3}) is None
