"""The repository that `--to triton` writes: NVIDIA's own messages parse it, and it says what Triton may do."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper
from tritonclient.grpc import model_config_pb2

from services.compiler.targets import triton
from services.compiler.targets.triton import BuiltGraph, RepositoryOptions
from services.kit.faults import Fault, Kind
from services.runtimes.artifacts.manifest import Axis, Graph, Port
from tests.support import small_graphs

OPTIONS = RepositoryOptions("small-", "float32", max_batch_size=64)


def written(built: BuiltGraph, folder: Path, hardware: str = "cpu", options: RepositoryOptions = OPTIONS) -> Any:
    """The configuration of the one model, as Triton would parse it."""
    (graph,) = triton.write_repository([built], folder, hardware, options)
    assert graph.file.startswith("repository/")
    model = (folder / graph.file).parent.parent
    return text_format.Parse((model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def test_one_batch_axis_lets_triton_batch(source: Path, tmp_path: Path) -> None:
    config = written(small_graphs.encoder(source), tmp_path)
    assert (config.name, config.backend, config.platform) == ("small-encoder", "onnxruntime", "onnxruntime_onnx")
    assert config.max_batch_size == 8
    assert [list(entry.dims) for entry in config.input] == [[4, -1], [1, 1]]
    assert config.dynamic_batching.max_queue_delay_microseconds == 1000
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_CPU
    assert config.version_policy.latest.num_versions == 1
    assert not config.model_transaction_policy.decoupled


def test_rows_and_images_of_different_number_are_left_alone(source: Path, tmp_path: Path) -> None:
    config = written(small_graphs.decoder(source), tmp_path)
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert {entry.name: list(entry.dims) for entry in config.input} == {
        "tokens": [-1],
        "past": [-1, -1],
        "cross": [-1, 4],
        "places": [-1],
    }


def test_rows_that_would_change_each_other_are_left_alone(source: Path, tmp_path: Path) -> None:
    """Dynamic 8-bit ranges span the batch: a stranger's rows would change one's own results."""
    config = written(small_graphs.encoder(source), tmp_path, options=replace(OPTIONS, precision="int8_dynamic"))
    assert config.max_batch_size == 0


def test_the_request_bounds_the_batch_and_the_gpu_gets_its_instances(source: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, max_batch_size=4, instance_count=2)
    config = written(small_graphs.encoder(source), tmp_path, "cuda", options)
    assert config.max_batch_size == 4
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert config.instance_group[0].count == 2


def test_warmup_holds_realistic_inputs_of_a_small_and_a_usual_request(source: Path, tmp_path: Path) -> None:
    config = written(small_graphs.decoder(source), tmp_path)
    shapes = {warmup.name: list(warmup.inputs["past"].dims) for warmup in config.model_warmup}
    assert shapes == {"small": [1, 1], "usual": [4, 6]}
    file = (
        tmp_path / "repository" / "small-decoder" / "warmup" / config.model_warmup[1].inputs["tokens"].input_data_file
    )
    assert np.frombuffer(file.read_bytes(), np.int64).tolist() == [0, 0, 0, 0]


def test_large_floats_are_warmed_with_zeros(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "WARMUP_FILE_BYTES", 16)
    config = written(small_graphs.decoder(source), tmp_path)
    usual = config.model_warmup[1].inputs
    assert usual["past"].zero_data
    assert not usual["tokens"].zero_data  # token numbers stay real, whatever their size


def test_scalars_become_one_element_for_triton_and_compute_the_same(source: Path, tmp_path: Path) -> None:
    built = small_graphs.denoiser(source)
    config = written(built, tmp_path)
    assert [list(entry.dims) for entry in config.input] == [[-1, 4], [1]]
    session = onnxruntime.InferenceSession(str(tmp_path / "repository" / "small-unet" / "1" / "model.onnx"))
    sample = np.arange(4, dtype=np.float32).reshape(1, 4)
    (noise,) = session.run(None, {"sample": sample, "timestep": np.array([3], np.float32)})
    assert noise.tolist() == (sample * 3).tolist()


def test_external_weights_come_along_under_their_own_name(source: Path, tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones(1024, np.float32), "weight")
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 1024]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "weight"], ["y"])], "g", ports[:1], ports[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, str(source / "g.onnx"), save_as_external_data=True, location="g.weights", size_threshold=0)
    described = Graph(
        "encoder",
        "g.onnx",
        (Port("x", "float32", ("rows", 1024)),),
        (Port("y", "float32", ("rows", 1024)),),
        (Axis("rows", 1, 2),),
        4096,
    )
    example = {"x": torch.zeros(1, 1024)}
    config = written(BuiltGraph(described, source / "g.onnx", lambda sizes: example), tmp_path)
    session = onnxruntime.InferenceSession(str(tmp_path / "repository" / "small-encoder" / "1" / "model.onnx"))
    assert session.run(None, {"x": np.zeros((1, 1024), np.float32)})[0].sum() == 1024
    # The same graph with other weights is another build to whoever asks the server.
    (source / "g.weights").write_bytes(bytes(4096))
    other = written(BuiltGraph(described, source / "g.onnx", lambda sizes: example), tmp_path / "other")
    identities = {each.parameters["inkwell_sha256"].string_value for each in (config, other)}
    assert len(identities) == 2


def test_accelerators_stand_where_their_backend_reads_them(source: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, precision="float16", accelerator="tensorrt")
    config = written(small_graphs.encoder(source), tmp_path, "cuda", options)
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt"
    assert accelerator.parameters["precision_mode"] == "FP16"
    assert accelerator.parameters["trt_profile_max_shapes"] == "pixels:8x4x64,weight:8x1x1"
    with pytest.raises(Fault, match="ACCELERATOR_NOT_FIT"):
        written(small_graphs.encoder(source), tmp_path / "other", "cpu", options)


def test_a_type_that_the_backend_lacks_is_refused_by_tensor(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Fault, match="onnxruntime backend has no bfloat16 tensors, and in is one") as caught:
        written(small_graphs.identity(source, "bfloat16"), tmp_path)
    assert caught.value.data.kind is Kind.FAILED_PRECONDITION


@pytest.mark.parametrize(
    ("name", "backend", "platform"), [("e.plan", "tensorrt", "tensorrt_plan"), ("e.xml", "openvino", "")]
)
def test_engines_and_openvino_graphs_get_their_own_backend(
    source: Path, tmp_path: Path, name: str, backend: str, platform: str
) -> None:
    """Triton is not run on them here: only what it is told is checked."""
    (source / name).write_bytes(b"engine")
    (source / "e.bin").write_bytes(b"weights")
    built = small_graphs.encoder(source)
    config = written(BuiltGraph(built.graph, source / name, built.example), tmp_path, "cpu")
    assert (config.backend, config.platform) == (backend, platform)
    assert config.default_model_filename == f"model.{name[2:]}"
    # OpenVINO's backend takes full batches only.
    assert config.max_batch_size == (8 if backend == "tensorrt" else 0)
    version = tmp_path / "repository" / "small-encoder" / "1"
    assert sorted(file.name for file in version.iterdir()) == (
        ["model.bin", "model.xml"] if backend == "openvino" else ["model.plan"]
    )
