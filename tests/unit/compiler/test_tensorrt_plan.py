"""What is decided about a TensorRT engine before it is built, and what a machine without CUDA answers."""

import shlex
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from services.compiler.targets import tensorrt, tensorrt_machine
from services.compiler.targets.axes import sizes
from services.compiler.targets.tensorrt_machine import Machine
from services.kit.faults import Fault, Kind
from services.runtimes.artifacts.manifest import ArtifactPrecision, Axis
from services.runtimes.cuda_device import CudaDevice
from tests.support import small_graphs

GIB = 1024**3
L4 = Machine(CudaDevice("NVIDIA L4", (8, 9), 24 * GIB, "580.95.05"), "11.4.0.106")
T4 = Machine(CudaDevice("NVIDIA T4", (7, 5), 16 * GIB, "580.95.05"), "11.4.0.106")


def planned(folder: Path, machine: Machine = L4, precision: ArtifactPrecision = "float32") -> tensorrt.Plan:
    built = small_graphs.decoder(folder)
    graph = built.graph
    return tensorrt.plan(graph.component, built.file, graph.inputs, graph.axes, precision, machine)


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (Axis("rows", 1, 64), (1, 8, 64)),
        (Axis("past", 0, 511), (0, 23, 511)),
        (Axis("height", 64, 64), (64, 64, 64)),
        (Axis("empty", 0, 0), (0, 0, 0)),
        (Axis("height", 6, 14), (6, 10, 14)),
        (Axis("half_of_height", 3, 7), (3, 5, 7)),
    ],
)
def test_profiles_reach_from_the_smallest_to_the_largest_size(axis: Axis, expected: tuple[int, int, int]) -> None:
    assert sizes(axis) == expected


def test_every_dynamic_input_has_a_profile(tmp_path: Path) -> None:
    profile = planned(tmp_path).profile
    assert set(profile) == {"tokens", "past", "cross", "places"}
    assert (profile["past"].low, profile["past"].optimal, profile["past"].high) == ((1, 0), (4, 6), (16, 32))
    assert (profile["cross"].low, profile["cross"].high) == ((1, 4), (16, 4))


def test_float32_is_not_rounded_to_tf32_and_older_versions_are_told_to_keep_types(tmp_path: Path) -> None:
    assert planned(tmp_path).cleared_flags == ("TF32",)
    assert planned(tmp_path, precision="float16").cleared_flags == ()
    assert planned(tmp_path).network_flags == ()
    assert planned(tmp_path, replace(L4, tensorrt="10.15.1.29")).network_flags == ("STRONGLY_TYPED",)


def test_workspace_leaves_room_for_the_weights_and_others() -> None:
    assert tensorrt.workspace_bytes(24 * GIB, 2 * GIB) == (24 - 4 - 1) * GIB // 2
    assert tensorrt.workspace_bytes(4 * GIB, 2 * GIB) == 256 * 1024**2


def test_timing_caches_are_of_one_device_driver_and_version(tmp_path: Path) -> None:
    keys = {
        planned(tmp_path, machine).timing_cache_key
        for machine in (
            L4,
            replace(L4, tensorrt="11.3.0.1"),
            replace(L4, device=replace(L4.device, driver="570.1")),
            replace(L4, device=replace(L4.device, capability=(9, 0))),
            replace(L4, device=replace(L4.device, name="NVIDIA L40S")),
        )
    }
    assert len(keys) == 5
    assert planned(tmp_path).timing_cache_key.startswith("timing-11.4.0.106-sm89-580.95.05-")


def test_engines_are_one_by_content_and_not_by_place(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = planned(tmp_path / "a"), planned(tmp_path / "b")
    assert first.onnx_file != second.onnx_file
    assert first.engine_key == second.engine_key
    assert planned(tmp_path / "a", T4).engine_key != first.engine_key
    assert msgspec.structs.replace(first, workspace_bytes=1).engine_key != first.engine_key


def test_external_weights_count_into_the_engine_key(tmp_path: Path) -> None:
    keys = set()
    for value in (1.0, 2.0):
        folder = tmp_path / str(value)
        folder.mkdir()
        weight = numpy_helper.from_array(np.full(1024, value, np.float32), "weight")
        ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1024]) for name in ("x", "y")]
        graph = helper.make_graph(
            [helper.make_node("Add", ["x", "weight"], ["y"])], "g", ports[:1], ports[1:], [weight]
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
        onnx.save(model, str(folder / "g.onnx"), save_as_external_data=True, location="g.data", size_threshold=0)
        plan = tensorrt.plan("unet", folder / "g.onnx", (), (), "float32", L4)
        keys.add((plan.engine_key, (folder / "g.onnx").read_bytes()))
    assert len({key for key, _ in keys}) == 2
    assert len({content for _, content in keys}) == 1


def test_the_command_by_hand_says_what_the_plan_says(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    words = shlex.split(tensorrt.command(plan, tmp_path / "model.plan"))
    assert words[0] == "trtexec"
    assert f"--onnx={tmp_path}/decoder.onnx" in words
    assert "--minShapes=tokens:1,past:1x0,cross:1x4,places:1" in words
    assert "--maxShapes=tokens:16,past:16x32,cross:16x4,places:16" in words
    assert f"--memPoolSize=workspace:{plan.workspace_bytes // 1024**2}" in words
    assert "--noTF32" in words
    report = tensorrt.report(plan, tmp_path / "model.plan")
    assert "TensorRT 10.15" in report
    assert "2026-02-02" in report
    assert "past: [1, 0] [4, 6] [16, 32]" in report
    assert plan.engine_key in report


@pytest.mark.parametrize(
    ("machine", "precision", "told"),
    [
        (T4, "bfloat16", "compute capability 8.0 or more, and NVIDIA T4 has 7.5"),
        (L4, "int8_dynamic", "TensorRT has no int8_dynamic; it takes float32, float16, bfloat16, int8_static"),
        (L4, "int8_weight_only", "TensorRT has no int8_weight_only"),
    ],
)
def test_precisions_that_the_device_lacks_are_refused(
    tmp_path: Path, machine: Machine, precision: ArtifactPrecision, told: str
) -> None:
    with pytest.raises(Fault, match="PRECISION_NOT_SUPPORTED") as caught:
        planned(tmp_path, machine, precision)
    assert caught.value.data.kind is Kind.FAILED_PRECONDITION
    assert told in caught.value.data.message


@pytest.mark.parametrize(("capability", "fits"), [((8, 6), False), ((8, 9), True)])
def test_types_within_the_graph_count_too(tmp_path: Path, capability: tuple[int, int], fits: bool) -> None:
    port = helper.make_tensor_value_info("x", TensorProto.FLOAT8E4M3FN, [4])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    scale = numpy_helper.from_array(np.array(1, np.float32), "scale")
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", ["x", "scale"], ["y"])], "g", [port], [out], [scale]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), str(tmp_path / "g.onnx"))
    machine = replace(L4, device=replace(L4.device, capability=capability))
    if fits:
        tensorrt.plan("unet", tmp_path / "g.onnx", (), (), "float16", machine)
        return
    with pytest.raises(Fault, match="FLOAT8E4M3FN takes a device of compute capability 8.9"):
        tensorrt.plan("unet", tmp_path / "g.onnx", (), (), "float16", machine)


def test_a_graph_that_tensorrt_refuses_is_named_by_node_and_operator(tmp_path: Path) -> None:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Det", ["x"], ["y"], name="layers.0/det")], "g", ports[:1], ports[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), str(tmp_path / "g.onnx"))
    with pytest.raises(Fault, match=r"unet: TensorRT does not take 1 nodes: Det at node layers\.0/det") as caught:
        tensorrt.plan("unet", tmp_path / "g.onnx", (), (), "float32", L4)
    assert caught.value.data.kind is Kind.FAILED_PRECONDITION
    assert caught.value.data.reason == "OPERATORS_NOT_SUPPORTED"


@pytest.mark.skipif(not tensorrt_machine.missing(), reason="this machine has CUDA and tensorrt: nothing is missing")
def test_a_machine_without_cuda_says_what_is_missing_before_it_does_anything(tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(Fault) as caught:
        tensorrt.build(planned(tmp_path), tmp_path / "model.plan", cache_folder=tmp_path / "cache", say=lines.append)
    fault = caught.value.data
    assert fault.kind is Kind.FAILED_PRECONDITION
    assert fault.reason == "TENSORRT_NOT_HERE"
    assert tensorrt_machine.missing() in fault.message
    assert "node with label cuda" in fault.message
    assert lines == []
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["decoder.onnx"]
