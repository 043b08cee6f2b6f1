"""Which artifact a model runs from, as a table; and what is said when there is none."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from services.runtimes.artifacts.built_on import Machine, machine, refusal
from services.runtimes.artifacts.choice import ChoiceError, choose
from services.runtimes.artifacts.errors import Reason, StoreError
from services.runtimes.artifacts.manifest import BuiltOn, Manifest, Requires, artifact_id, encode
from services.runtimes.artifacts.store import Stored
from services.runtimes.hardware import Hardware, detect
from tests.support.artifacts import manifest

CPU = Machine(
    Hardware("cpu", "cpu", "CPU", 8 << 30, 4),
    "some CPU",
    ("avx2", "avx512_bf16"),
    "",
    {"onnxruntime": "1.32.0", "openvino": "2026.4.1", "tritonclient": "2.73.0"},
    24,
)
OLD_CPU = Machine(CPU.hardware, "old CPU", ("avx2",), "", CPU.versions, 24)
L4 = Machine(
    Hardware("cuda", "cuda:0", "NVIDIA L4", 24 << 30, 8),
    "NVIDIA L4",
    ("avx2",),
    "8.9",
    {"onnxruntime": "1.32.0", "tensorrt": "10.14.1"},
    24,
)


@dataclass
class Shelf:
    """The part of a store that decides."""

    stored: list[Stored]
    chosen: dict[str, str] = field(default_factory=dict)

    def find(self, *, source_digest: str) -> list[Stored]:
        return [stored for stored in self.stored if stored.manifest.source_digest == source_digest]

    def get(self, id_or_prefix: str) -> Stored:
        for stored in self.stored:
            if stored.id.startswith(id_or_prefix):
                return stored
        raise StoreError(Reason.NOT_FOUND, f"there is no artifact {id_or_prefix}")

    def used(self, model: str) -> str | None:
        return self.chosen.get(model)


def stored(what: Manifest) -> Stored:
    content = encode(what)
    return Stored(artifact_id(content), what, content, 0.0)


def cpu(number: int, speed: float | None = 2.0, *, features: tuple[str, ...] = (), **changes: Any) -> Stored:
    return stored(manifest(number, speed=speed, built_on=BuiltOn("cpu", "a CPU", features, {}), **changes))


def engine(number: int, capability: str = "8.9", speed: float = 5.0, **versions: str) -> Stored:
    return stored(
        manifest(
            number,
            speed=speed,
            target="tensorrt",
            precision="float16",
            built_on=BuiltOn("cuda", "NVIDIA L4", (), {}),
            requires=Requires("cuda", capability, versions or {"tensorrt": "10.14.1"}),
        )
    )


ONNX = cpu(1, 2.0)
OPENVINO = cpu(2, 3.0, target="openvino")
INT8 = cpu(3, 4.0, target="openvino", precision="int8_weight_only")
BF16 = cpu(4, 6.0, target="openvino", precision="bfloat16", features=("avx2", "avx512_bf16"))
SLOW = cpu(5, 0.9, target="openvino", precision="float16")
UNMEASURED = cpu(6, None, target="openvino", precision="float16")
OTHER = cpu(7, 9.0, source_digest="6" * 64)
TENSORRT = engine(8)
OTHER_GPU = engine(9, "8.0")
OTHER_TENSORRT = engine(10, tensorrt="10.9.0")
NEWER_ONNX = cpu(11, 9.0, requires=Requires(onnx_opset=25))
TRITON = cpu(12, None, target="triton")
ALL = [
    ONNX,
    OPENVINO,
    INT8,
    BF16,
    SLOW,
    UNMEASURED,
    OTHER,
    TENSORRT,
    OTHER_GPU,
    OTHER_TENSORRT,
    NEWER_ONNX,
    TRITON,
]


@pytest.mark.parametrize(
    ("there", "options", "here", "expected"),
    [
        ([], {}, CPU, None),
        # The fastest of what fits.
        (ALL, {}, CPU, BF16),
        (ALL, {"precision": "float32"}, CPU, OPENVINO),
        (ALL, {"precision": "int8_weight_only"}, CPU, INT8),
        (ALL, {}, L4, TENSORRT),
        # What was measured on a CPU that can more says nothing.
        (ALL, {}, OLD_CPU, INT8),
        # Never what is slower than torch, or was not measured, unless it is asked for.
        ([SLOW, UNMEASURED, OTHER, TENSORRT, NEWER_ONNX], {}, CPU, None),
        ([SLOW, UNMEASURED], {"runtime": "openvino"}, CPU, SLOW),
        ([UNMEASURED], {"runtime": "openvino"}, CPU, UNMEASURED),
        # Where a Triton server is has to be told.
        ([cpu(90, 9.0, target="triton")], {}, CPU, None),
        ([ONNX], {}, L4, None),
        ([ONNX], {"runtime": "onnxruntime"}, L4, ONNX),
        # What was asked for.
        (ALL, {"runtime": "torch"}, CPU, None),
        (ALL, {"runtime": "onnxruntime"}, CPU, ONNX),
        (ALL, {"runtime": "openvino"}, CPU, BF16),
        (ALL, {"runtime": "openvino", "precision": "float32"}, CPU, OPENVINO),
        (ALL, {"runtime": "openvino"}, OLD_CPU, INT8),
        (ALL, {"runtime": "tensorrt"}, L4, TENSORRT),
        (ALL, {"runtime": "triton"}, CPU, TRITON),
        (ALL, {"artifact": ONNX.id[:12]}, CPU, ONNX),
        (ALL, {"artifact": ONNX.id, "runtime": "openvino", "precision": "bfloat16"}, CPU, ONNX),
        (ALL, {"artifact": ONNX.id, "runtime": "torch"}, CPU, ONNX),
    ],
)
def test_the_fastest_that_is_right_and_can_run_is_taken(
    there: list[Stored], options: dict[str, Any], here: Machine, expected: Stored | None
) -> None:
    for shelf in (Shelf(there), Shelf(there[::-1])):
        assert choose(shelf, "5" * 64, model="m", hardware=here.hardware, here=here, **options) == expected


@pytest.mark.parametrize(
    ("used", "options", "here", "expected"),
    [
        (ONNX, {}, CPU, ONNX),
        (SLOW, {}, CPU, SLOW),
        (SLOW, {"precision": "float16"}, CPU, SLOW),
        (ONNX, {"runtime": "onnxruntime", "precision": "float32"}, CPU, ONNX),
        (ONNX, {"runtime": "torch"}, CPU, None),
        (ONNX, {"artifact": INT8.id}, CPU, INT8),
        # Machines that share a store run different things.
        (TENSORRT, {}, CPU, BF16),
        (TENSORRT, {}, L4, TENSORRT),
        (INT8, {"runtime": "tensorrt"}, L4, TENSORRT),
        (ONNX, {"runtime": "openvino", "precision": "int8_weight_only"}, CPU, INT8),
    ],
)
def test_what_use_chose_comes_first_where_it_is_meant_for(
    used: Stored, options: dict[str, Any], here: Machine, expected: Stored | None
) -> None:
    shelf = Shelf(ALL, {"m": used.id, "other": OTHER.id})
    assert choose(shelf, "5" * 64, model="m", hardware=here.hardware, here=here, **options) == expected


@pytest.mark.parametrize(
    ("there", "options", "here", "said"),
    [
        ([ONNX], {"runtime": "openvino"}, CPU, "make one: inkwell compile m --to openvino, or set runtime"),
        ([OPENVINO], {"runtime": "onnxruntime"}, CPU, "make one: inkwell compile m --to onnx, or set runtime"),
        ([OTHER], {"runtime": "onnxruntime"}, CPU, "no artifact of this checkpoint for onnxruntime"),
        (
            [OPENVINO, INT8],
            {"runtime": "openvino", "precision": "bfloat16"},
            CPU,
            "have precision float32, int8_weight_only, not bfloat16; make one: inkwell compile m --to openvino"
            " --precision bfloat16",
        ),
        ([TENSORRT], {"runtime": "tensorrt"}, CPU, r"tensorrt is not installed; .*inkwell\[tensorrt\]"),
        ([OTHER_GPU], {"runtime": "tensorrt"}, L4, "capability 8.0, .* NVIDIA L4 is 8.9; compile it on this machine"),
        ([OTHER_TENSORRT], {"runtime": "tensorrt"}, L4, "tensorrt 10.9.0 .* 10.14.1 is installed; .*tensorrt==10.9.0"),
        ([NEWER_ONNX], {"runtime": "onnxruntime"}, CPU, r"operator set 25, .*\(1.32.0\) knows 24 at most; update"),
        ([OTHER], {"artifact": OTHER.id}, CPU, "another checkpoint .*: inkwell compile m --to onnx"),
        ([OTHER_GPU], {"artifact": OTHER_GPU.id}, L4, "cannot run here: it was built for GPUs of compute capability"),
    ],
)
def test_what_cannot_be_run_is_refused_with_what_to_do(
    there: list[Stored], options: dict[str, Any], here: Machine, said: str
) -> None:
    with pytest.raises(ChoiceError, match=said):
        choose(Shelf(there), "5" * 64, model="m", hardware=here.hardware, here=here, **options)


@pytest.mark.parametrize(
    ("used", "options", "said"),
    [
        (OTHER.id, {}, "another checkpoint"),
        (INT8.id, {"precision": "float32"}, "has precision int8_weight_only, and the setting asks for float32"),
        (NEWER_ONNX.id, {}, "cannot run here"),
        ("0" * 64, {}, "no longer there; choose another"),
    ],
)
def test_a_choice_that_cannot_be_followed_is_told_and_not_passed_over(
    used: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ChoiceError, match=said):
        choose(Shelf(ALL, {"m": used}), "5" * 64, model="m", hardware=CPU.hardware, here=CPU, **options)


def test_an_artifact_for_other_hardware_or_versions_is_refused() -> None:
    blobs = manifest(target="openvino", requires=Requires("xpu", "", {"openvino": "2026.4.1"}))
    assert "built for xpu, and this machine runs on cpu" in refusal(blobs, CPU)
    older = manifest(target="openvino", precision="float16", requires=Requires("cpu", "", {"openvino": "2025.1.0"}))
    assert "--to openvino --precision float16" in refusal(older, CPU)
    assert "install openvino==2025.1.0" in refusal(older, CPU)
    assert "tensorrt 10.9.0, which is not installed" in refusal(
        manifest(requires=Requires(versions={"tensorrt": "10.9.0"})), CPU
    )
    assert "inkwell[openvino]" in refusal(manifest(target="openvino"), L4)
    # Triton's server has the hardware.
    assert refusal(manifest(target="triton", requires=Requires("cuda", "8.9", {"tensorrt": "10.9.0"})), CPU) == ""
    assert "inkwell[triton]" in refusal(manifest(target="triton"), L4)
    assert refusal(manifest(requires=Requires(onnx_opset=24)), CPU) == ""
    # A build of ONNX Runtime that does not tell what it knows says so itself when it opens the graph.
    assert refusal(manifest(requires=Requires(onnx_opset=25)), replace(CPU, onnx_opset=0)) == ""


def test_this_machine_is_told_as_it_is() -> None:
    here = machine(detect())
    assert here.versions["onnxruntime"]
    assert here.onnx_opset >= 18
    assert here.processor
    made = here.built_on()
    assert made.versions == here.versions
    assert refusal(manifest(built_on=made, requires=Requires(here.hardware.label, onnx_opset=18)), here) == ""
