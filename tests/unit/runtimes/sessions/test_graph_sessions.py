"""Sessions of ONNX Runtime and OpenVINO on real graphs: what they compute, and what they refuse in what words."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from services.runtimes.artifacts.manifest import Port, RuntimeName
from services.runtimes.hardware import Hardware
from services.runtimes.sessions.interface import HardwareMissingError, Session, SessionError, SessionOptions
from services.runtimes.sessions.onnxruntime_session import providers_for
from services.runtimes.sessions.opening import open_session
from services.runtimes.sessions.openvino_session import properties

CPU = Hardware("cpu", "cpu", "CPU", 0, 2)
CUDA = Hardware("cuda", "cuda:1", "NVIDIA L4", 24 << 30, 8)
ROCM = Hardware("rocm", "cuda:0", "AMD Instinct MI210", 64 << 30, 8)
OPTIONS = SessionOptions(CPU, threads=1)
TYPES = {
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "bool": TensorProto.BOOL,
}
both = pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])


def write(
    file: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: list[Any] | None = None
) -> Path:
    """A checked graph; inputs and outputs are (name, type, shape)."""
    ports = [[helper.make_tensor_value_info(*port) for port in each] for each in (inputs, outputs)]
    graph = helper.make_graph(nodes, "graph", ports[0], ports[1], initializer=weights or [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, str(file))
    return file


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    """product = rows @ weight, double = rows + rows; rows float32 [rows, 3]."""
    weight = numpy.arange(6, dtype=numpy.float32).reshape(3, 2)
    return write(
        tmp_path / "linear.onnx",
        [
            helper.make_node("MatMul", ["rows", "weight"], ["product"]),
            helper.make_node("Add", ["rows"] * 2, ["double"]),
        ],
        [("rows", TensorProto.FLOAT, ["rows", 3])],
        [("product", TensorProto.FLOAT, ["rows", 2]), ("double", TensorProto.FLOAT, ["rows", 3])],
        [numpy_helper.from_array(weight, "weight")],
    )


@pytest.fixture
def opened() -> Iterator[Any]:
    """Opens sessions, and closes them after the test."""
    sessions: list[Session] = []

    def open_one(file: Path, runtime: RuntimeName, options: SessionOptions = OPTIONS) -> Session:
        sessions.append(open_session(file, runtime, options))
        return sessions[-1]

    yield open_one
    for session in sessions:
        session.close()


@both
def test_a_graph_computes_what_torch_does(linear: Path, runtime: RuntimeName, opened: Any) -> None:
    session = opened(linear, runtime)
    assert session.runtime == runtime
    assert [(port.name, port.dtype) for port in session.inputs] == [("rows", "float32")]
    assert [port.name for port in session.outputs] == ["product", "double"]
    assert session.inputs[0].shape[1] == 3
    assert isinstance(session.inputs[0].shape[0], str)
    weight = torch.arange(6.0).reshape(3, 2)
    for count in (1, 5, 2):
        rows = torch.randn(count, 3)
        answer = session.run({"rows": rows})
        torch.testing.assert_close(answer["product"], rows @ weight)
        assert torch.equal(answer["double"], rows + rows)


@both
def test_only_what_is_wanted_is_answered(linear: Path, runtime: RuntimeName, opened: Any) -> None:
    assert opened(linear, runtime).run({"rows": torch.ones(1, 3)}, ["double"]).keys() == {"double"}


@both
def test_results_outlive_the_next_run_and_the_session(linear: Path, runtime: RuntimeName) -> None:
    session = open_session(linear, runtime, OPTIONS)
    first = session.run({"rows": torch.ones(2, 3)})
    session.run({"rows": torch.zeros(2, 3)})
    session.close()
    assert torch.equal(first["double"], torch.full((2, 3), 2.0))
    first["double"].add_(1)  # the caller's own


@both
@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_passes_through_bit_for_bit(tmp_path: Path, runtime: RuntimeName, dtype: str, opened: Any) -> None:
    kind = TYPES[dtype]
    file = write(
        tmp_path / "twice.onnx",
        [helper.make_node("Concat", ["x", "x"], ["y"], axis=0)],
        [("x", kind, ["n", 3])],
        [("y", kind, ["m", 3])],
    )
    session = opened(file, runtime)
    assert session.inputs[0].dtype == session.outputs[0].dtype == dtype
    x = (torch.randn(4, 3) * 100).abs().to(getattr(torch, dtype))
    y = session.run({"x": x})["y"]
    assert y.dtype is x.dtype
    assert torch.equal(y, torch.cat([x, x]))
    assert session.run({"x": x[:0]})["y"].shape == (0, 3)


@both
def test_inputs_need_not_be_contiguous(linear: Path, runtime: RuntimeName, opened: Any) -> None:
    rows = torch.randn(3, 4).T[:, :]
    assert torch.equal(opened(linear, runtime).run({"rows": rows})["double"], rows + rows)


def test_onnxruntime_reads_inputs_where_they_lie(linear: Path, opened: Any) -> None:
    session = opened(linear, "onnxruntime")
    whole = torch.zeros(8, 3)
    session.run({"rows": whole[:4]})
    whole[:4] = 1.0
    assert torch.equal(session.run({"rows": whole[:4]})["double"], torch.full((4, 3), 2.0))


def test_onnx_weights_may_lie_beside_the_graph(tmp_path: Path, linear: Path, opened: Any) -> None:
    model = onnx.load(str(linear))
    onnx.save_model(
        model, str(tmp_path / "apart.onnx"), save_as_external_data=True, location="apart.data", size_threshold=0
    )
    rows = torch.randn(2, 3)
    weight = torch.arange(6.0).reshape(3, 2)
    for runtime in ("onnxruntime", "openvino"):
        torch.testing.assert_close(
            opened(tmp_path / "apart.onnx", runtime).run({"rows": rows})["product"], rows @ weight
        )
    (tmp_path / "apart.data").unlink()
    for runtime in ("onnxruntime", "openvino"):
        with pytest.raises(SessionError, match=r"apart\.onnx: (ONNX Runtime|OpenVINO) cannot open it: .*apart\.data"):
            opened(tmp_path / "apart.onnx", runtime)


@both
@pytest.mark.parametrize(
    ("feeds", "told"),
    [
        ({}, r"input rows is missing; its inputs are rows"),
        ({"rows": torch.ones(1, 3), "more": torch.ones(1)}, r"there is no input more; its inputs are rows"),
        ({"rows": torch.ones(1, 3, dtype=torch.float16)}, r"input rows has dtype float16, wanted is float32"),
        ({"rows": torch.ones(1, 4)}, r"input rows has shape \[1, 4\], wanted is \[.*, 3\]"),
        ({"rows": torch.ones(3)}, r"input rows has shape \[3\]"),
    ],
)
def test_unfit_inputs_are_named(
    linear: Path, runtime: RuntimeName, feeds: dict[str, torch.Tensor], told: str, opened: Any
) -> None:
    with pytest.raises(SessionError, match=rf"linear\.onnx: {told}"):
        opened(linear, runtime).run(feeds)


def test_sizes_of_one_axis_have_to_agree(tmp_path: Path, opened: Any) -> None:
    file = write(
        tmp_path / "sum.onnx",
        [helper.make_node("Add", ["a", "b"], ["c"])],
        [("a", TensorProto.FLOAT, ["n", 1]), ("b", TensorProto.FLOAT, ["n", 1])],
        [("c", TensorProto.FLOAT, ["n", 1])],
    )
    with pytest.raises(SessionError, match=r"input b has shape \[3, 1\], wanted is \[n=2, 1\]"):
        opened(file, "onnxruntime").run({"a": torch.ones(2, 1), "b": torch.ones(3, 1)})


def test_a_graph_that_fails_midway_says_so(tmp_path: Path, opened: Any) -> None:
    file = write(
        tmp_path / "sum.onnx",
        [helper.make_node("Add", ["a", "b"], ["c"])],
        [("a", TensorProto.FLOAT, ["n"]), ("b", TensorProto.FLOAT, ["m"])],
        [("c", TensorProto.FLOAT, ["k"])],
    )
    session = opened(file, "onnxruntime")
    with pytest.raises(SessionError, match=r"sum\.onnx: .* failed on it"):
        session.run({"a": torch.ones(5), "b": torch.ones(3)})
    assert torch.equal(session.run({"a": torch.ones(4), "b": torch.ones(4)})["c"], torch.full((4,), 2.0))  # and goes on


@both
@pytest.mark.parametrize("content", [b"", b"not a graph at all"])
def test_broken_files_are_named(tmp_path: Path, runtime: RuntimeName, content: bytes, opened: Any) -> None:
    name = "broken.onnx" if runtime == "onnxruntime" else "broken.xml"
    with pytest.raises(SessionError, match=rf"{name}: there is no such file; fetch or compile"):
        opened(tmp_path / name, runtime)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SessionError, match=rf"{name}: .* cannot open it"):
        opened(tmp_path / name, runtime)


def test_torch_runs_no_graphs(linear: Path) -> None:
    with pytest.raises(SessionError, match="torch runs checkpoints and no graphs"):
        open_session(linear, "torch", OPTIONS)


# --- ONNX Runtime's providers ---


def providers(hardware: Hardware, **options: Any) -> dict[str, dict[str, str]]:
    return dict(providers_for(hardware, SessionOptions(hardware, **options)))


def test_each_kind_of_hardware_has_its_provider_and_the_processor_last() -> None:
    assert list(providers(CPU)) == ["CPUExecutionProvider"]
    assert list(providers(CUDA)) == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert list(providers(ROCM)) == ["MIGraphXExecutionProvider", "CPUExecutionProvider"]
    assert providers(CUDA)["CUDAExecutionProvider"]["device_id"] == "1"
    assert providers(ROCM)["MIGraphXExecutionProvider"]["device_id"] == "0"


def test_16_bits_are_computed_in_only_where_they_are_allowed() -> None:
    named = ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    exact = providers(CUDA, providers=named)
    assert exact["CUDAExecutionProvider"]["use_tf32"] == "0"
    assert "trt_fp16_enable" not in exact["TensorrtExecutionProvider"]
    assert "migraphx_fp16_enable" not in providers(ROCM)["MIGraphXExecutionProvider"]
    fast = providers(CUDA, providers=named, allow_16_bit=True)
    assert fast["CUDAExecutionProvider"]["use_tf32"] == "1"
    assert fast["TensorrtExecutionProvider"]["trt_fp16_enable"] == "1"
    assert providers(ROCM, allow_16_bit=True)["MIGraphXExecutionProvider"]["migraphx_fp16_enable"] == "1"


def test_tensorrt_keeps_engines_and_timings_in_the_cache_folder(tmp_path: Path) -> None:
    chosen = providers(CUDA, providers=("TensorrtExecutionProvider",), cache_folder=tmp_path)
    tensorrt = chosen["TensorrtExecutionProvider"]
    assert tensorrt["trt_engine_cache_enable"] == tensorrt["trt_timing_cache_enable"] == "1"
    assert Path(tensorrt["trt_engine_cache_path"]).parent == tmp_path
    assert Path(tensorrt["trt_timing_cache_path"]).parent == tmp_path


def test_an_unknown_provider_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SessionError, match="there is no execution provider DmlExecutionProvider; accepted: CPU"):
        providers(CPU, providers=("DmlExecutionProvider",))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    ("hardware", "names", "lacks"),
    [
        (CUDA, (), "CUDAExecutionProvider"),
        (ROCM, (), "MIGraphXExecutionProvider"),
        (CUDA, ("TensorrtExecutionProvider",), "TensorrtExecutionProvider"),
    ],
)
def test_a_gpu_that_is_not_here_is_refused_and_not_replaced_by_the_processor(
    linear: Path, hardware: Hardware, names: tuple[str, ...], lacks: str, opened: Any
) -> None:
    with pytest.raises(HardwareMissingError, match=rf"linear\.onnx: {lacks} (is not in|cannot be used)"):
        opened(linear, "onnxruntime", SessionOptions(hardware, providers=names))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_package_that_lists_a_provider_it_cannot_use_is_not_believed(
    linear: Path, monkeypatch: pytest.MonkeyPatch, opened: Any
) -> None:
    import onnxruntime

    # As onnxruntime-gpu answers on a machine without a GPU.
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    with pytest.raises(HardwareMissingError, match="CUDAExecutionProvider cannot be used on this machine"):
        opened(linear, "onnxruntime", SessionOptions(CUDA))


@both
def test_a_missing_package_names_its_extra(
    linear: Path, runtime: RuntimeName, monkeypatch: pytest.MonkeyPatch, opened: Any
) -> None:
    monkeypatch.setitem(sys.modules, runtime, None)
    with pytest.raises(HardwareMissingError, match=rf"the package {runtime} is missing .*pip install 'inkwell\["):
        opened(linear, runtime)


# --- OpenVINO's precision ---


def test_openvino_computes_float32_unless_16_bits_are_allowed_and_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    able, unable = {"architecture": "x86_64", "avx512_bf16": True}, {"architecture": "x86_64", "avx2": True}
    for capabilities, allowed, hint in (
        (able, True, "bf16"),
        (able, False, "f32"),
        (unable, True, "f32"),
        (unable, False, "f32"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        # Whatever GPU is there: OpenVINO runs on the processor.
        for hardware in (CPU, CUDA):
            chosen = properties(replace(OPTIONS, hardware=hardware, allow_16_bit=allowed))
            assert chosen["INFERENCE_PRECISION_HINT"] == hint


def test_float32_graphs_stay_float32_on_every_processor(tmp_path: Path, opened: Any) -> None:
    weight = torch.randn(64, 64)
    file = write(
        tmp_path / "product.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [("x", TensorProto.FLOAT, ["n", 64])],
        [("y", TensorProto.FLOAT, ["n", 64])],
        [numpy_helper.from_array(weight.numpy(), "w")],
    )
    x = torch.randn(8, 64)
    y = opened(file, "openvino").run({"x": x})["y"]
    # bfloat16 has 8 bits of mantissa: its error would be a thousand times this.
    assert (y.double() - x.double() @ weight.double()).abs().max() < 1e-4
    assert opened(file, "openvino").inputs == (Port("x", "float32", ("x.0", 64)),)
