"""The operator check names every node that TensorRT's parser is documented to refuse, before a GPU is asked."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import FunctionProto, NodeProto, TensorProto, helper, numpy_helper

from services.compiler.targets.tensorrt_operators import SUPPORTED, UNSUPPORTED, Report, check

FLOAT = TensorProto.FLOAT


def checked(
    folder: Path,
    nodes: list[NodeProto],
    *,
    opset: int = 18,
    plugins: tuple[str, ...] = (),
    input_type: int = FLOAT,
    output_type: int = FLOAT,
    initializers: Sequence[TensorProto] = (),
    functions: Sequence[FunctionProto] = (),
    domains: Sequence[str] = (),
) -> Report:
    """Check a graph x -> y of these nodes."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", input_type, ["n", 4, 4, 4])],
        [helper.make_tensor_value_info("y", output_type, None)],
        initializer=initializers,
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(name, 1) for name in domains)]
    file = folder / "graph.onnx"
    onnx.save(helper.make_model(graph, opset_imports=imports, functions=functions), str(file))
    return check(file, plugins)


def test_a_graph_of_listed_operators_passes(tmp_path: Path) -> None:
    report = checked(tmp_path, [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Softmax", ["r"], ["y"])])
    assert report.problems == ()
    assert report.counts == {"Relu": 1, "Softmax": 1}
    assert report.opset == 18


def test_the_table_holds_operators_that_there_are_and_each_once() -> None:
    assert not UNSUPPORTED & set(SUPPORTED)
    known = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    # Older than ONNX 1.0; the parser still takes them.
    assert (set(SUPPORTED) | UNSUPPORTED) - known == {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}


def test_dynamic_quantization_is_refused_by_node_with_what_helps(tmp_path: Path) -> None:
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="fc1/quantize")
    cast = helper.make_node("Cast", ["q"], ["y"], to=FLOAT)
    (problem,) = checked(tmp_path, [node, cast]).refusals
    assert (problem.node, problem.operator) == ("fc1/quantize", "DynamicQuantizeLinear")
    assert "int8_static" in problem.why


def test_an_operator_of_another_domain_takes_a_plugin_of_its_name(tmp_path: Path) -> None:
    nodes = [helper.make_node("FusedGelu", ["x"], ["y"], name="gelu", domain="com.example")]
    (problem,) = checked(tmp_path, nodes, domains=["com.example"]).refusals
    assert problem.operator == "com.example::FusedGelu"
    assert "plugin of the name FusedGelu" in problem.why
    assert checked(tmp_path, nodes, domains=["com.example"], plugins=("FusedGelu",)).problems == ()


@pytest.mark.parametrize(
    ("node", "why"),
    [
        (helper.make_node("LayerNormalization", ["x", "w"], ["y", "mean"], name="n"), "mean is used too"),
        (helper.make_node("Resize", ["x", "", "scales"], ["y"], name="n", mode="cubic"), "mode must be one of nearest"),
        (helper.make_node("Resize", ["x", "", "scales"], ["y"], name="n", antialias=1, mode="linear"), "antialiasing"),
        (helper.make_node("MaxPool", ["x"], ["y"], name="n", kernel_shape=[2, 2], dilations=[2, 2]), "dilations"),
        (helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["y"], name="n"), "zero point must be 0"),
        (helper.make_node("TopK", ["x", "many"], ["y", "i"], name="n"), "less than 3840 and is 4000"),
        (helper.make_node("GridSample", ["w", "x"], ["y"], name="n"), "must have 4 dimensions and has 1"),
    ],
)
def test_restrictions_of_listed_operators_are_kept(tmp_path: Path, node: NodeProto, why: str) -> None:
    constants = {
        "w": np.ones(4, np.float32),
        "scales": np.ones(4, np.float32),
        "one": np.float32(1),
        "zero": np.int8(3),
        "many": np.array([4000]),
    }
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    refusals = checked(tmp_path, [node], initializers=initializers, output_type=TensorProto.UNDEFINED).refusals
    assert [problem.node for problem in refusals] == ["n"]
    assert why in refusals[0].why


def test_bodies_and_local_functions_are_looked_into(tmp_path: Path) -> None:
    body = helper.make_graph(
        [helper.make_node("Det", ["x"], ["d"], name="inner")],
        "body",
        [],
        [helper.make_tensor_value_info("d", FLOAT, None)],
    )
    function = helper.make_function(
        "local",
        "Twice",
        ["a"],
        ["b"],
        [helper.make_node("Unique", ["a"], ["b"], name="deep")],
        [helper.make_opsetid("", 18)],
    )
    condition = numpy_helper.from_array(np.array(True), "condition")
    report = checked(
        tmp_path,
        [
            helper.make_node("If", ["condition"], ["z"], name="outer", then_branch=body, else_branch=body),
            helper.make_node("Twice", ["z"], ["y"], name="call", domain="local"),
        ],
        initializers=[condition],
        functions=[function],
        domains=["local"],
    )
    assert sorted(problem.node for problem in report.refusals) == ["deep", "inner", "inner"]


def test_a_type_that_is_not_listed_is_doubtful_and_no_refusal(tmp_path: Path) -> None:
    report = checked(
        tmp_path,
        [helper.make_node("NonZero", ["x"], ["y"], name="n")],
        input_type=TensorProto.INT64,
        output_type=TensorProto.INT64,
    )
    assert [str(problem) for problem in report.problems] == [
        "NonZero at node n: not listed for INT64 (TensorRT 10.15)",
    ]
    assert report.refusals == ()


def test_a_graph_of_a_later_opset_is_refused(tmp_path: Path) -> None:
    (problem,) = checked(tmp_path, [helper.make_node("Relu", ["x"], ["y"])], opset=26).refusals
    assert "opset 26" in problem.why
    assert "25" in problem.why
