"""The accuracy-aware search, and the order in which layers are suspected."""

from collections.abc import Callable

import onnx
import pytest
import torch

from services.compiler import harm, layers, quantize_onnx
from services.compiler.search import BudgetError, Limit, search
from services.compiler.verify import error_of
from tests.support import graph_to_build

LIMIT = Limit("error", 0.5, False)


def worth(harms: dict[str, float], asked: list[frozenset[str]]) -> Callable[[frozenset[str]], float]:
    """The error of a model whose layers each add their own."""

    def evaluate(kept: frozenset[str]) -> float:
        asked.append(kept)
        return sum(value for name, value in harms.items() if name not in kept)

    return evaluate


def test_a_model_that_holds_the_budget_is_evaluated_once_and_nothing_ranked() -> None:
    asked: list[frozenset[str]] = []

    def rank() -> list[str]:
        raise AssertionError("nothing has to go back")

    found = search(rank, worth({"a": 0.3}, asked), LIMIT, lambda note: None)
    assert (found.kept, found.tries, asked) == (frozenset(), 1, [frozenset()])


@pytest.mark.parametrize("bad", [1, 2, 3, 7, 30, 64])
def test_as_few_layers_as_possible_go_back_in_few_tries(bad: int) -> None:
    harms = {f"layer{number}": 1.0 if number < bad else 0.001 for number in range(64)}
    asked: list[frozenset[str]] = []
    found = search(lambda: list(harms), worth(harms, asked), LIMIT, lambda note: None)
    assert found.kept == {f"layer{number}" for number in range(bad)}
    assert len(asked) == found.tries <= 2 * bad.bit_length() + 2
    assert len(set(asked)) == len(asked)


def test_every_try_is_told() -> None:
    told: list[str] = []
    search(lambda: ["a", "b"], worth({"a": 1.0, "b": 0.1}, []), LIMIT, told.append)
    assert told == [
        "try 1: all layers quantized: error 1.1 (at most 0.5), not enough",
        "try 2: 1 of 2 layers in float: error 0.1 (at most 0.5)",
    ]


def test_a_budget_that_not_even_float_holds_fails_with_the_figures() -> None:
    with pytest.raises(BudgetError, match=r"even with all 2 layers in float, error 2 \(at most 0\.5\)"):
        search(lambda: ["a", "b"], lambda kept: 2.0, LIMIT, lambda note: None)
    with pytest.raises(BudgetError, match="even with all 0 layers"):
        search(list, lambda kept: 2.0, LIMIT, lambda note: None)


def test_a_quality_that_is_no_number_does_not_hold() -> None:
    assert not LIMIT.holds(float("nan"))
    assert not Limit("psnr", 30, True, "dB").holds(float("nan"))


def test_the_layer_that_was_poisoned_goes_back() -> None:
    graph = graph_to_build.exported()
    model = layers.prepare(layers.load(graph.file))
    found = {layer.name: layer for layer in layers.find_layers(model)}
    tensor = layers.weights_of(model)[found["second"].weight]
    weight = onnx.numpy_helper.to_array(tensor).copy()
    # One huge number in each column leaves no levels for the others, and its input is never there.
    weight[5] = 300.0
    tensor.CopyFrom(onnx.numpy_helper.from_array(weight, tensor.name))
    bias = layers.weights_of(model)["first.bias"]
    values = onnx.numpy_helper.to_array(bias).copy()
    values[5] = -1000.0
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    feeds = graph.example({"batch": 4, "length": 9})
    right = run(model, feeds)

    def evaluate(kept: frozenset[str]) -> float:
        chosen = [layer for name, layer in found.items() if name not in kept]
        built = run(quantize_onnx.quantize(model, "int8_weight_only", chosen), feeds)
        return max(error_of(right[name], built[name], "root mean square") for name in right)

    harms = harm.rank(model, list(found.values()), "int8_weight_only", [feeds])
    assert max(harms, key=lambda name: harms[name]) == "second"
    outcome = search(
        lambda: sorted(harms, key=lambda name: -harms[name]), evaluate, Limit("error", 0.05, False), lambda note: None
    )
    assert outcome.kept == {"second"}
    assert outcome.value <= 0.05


def run(model: onnx.ModelProto, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    answer = session.run(names, {name: tensor.numpy() for name, tensor in feeds.items()})
    return {name: torch.from_numpy(array) for name, array in zip(names, answer, strict=True)}
