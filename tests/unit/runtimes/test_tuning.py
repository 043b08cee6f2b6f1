"""What is set for each kind of hardware, and what torch.compile may change."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from services.runtimes import on_cpu, on_rocm, tuning
from services.runtimes.hardware import Hardware
from services.runtimes.torch_trocr import TrocrModel
from tests.support import tiny_trocr

CPU = Hardware("cpu", "cpu", "CPU", 0, 2)


@pytest.fixture(autouse=True)
def _process_as_before() -> Iterator[None]:
    """These settings hold for the whole process."""
    precision, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    allowed = torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = allowed, benchmark


def test_float32_on_a_gpu_is_exact_unless_speed_is_asked_for() -> None:
    from services.runtimes import on_cuda

    gpu = Hardware("cuda", "cuda:0", "NVIDIA L4", 0, 8)
    on_cuda.prepare(gpu, exact=False)
    assert torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.benchmark
    assert torch.get_float32_matmul_precision() == "high"
    on_cuda.prepare(gpu, exact=True)
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cudnn.benchmark
    assert torch.get_float32_matmul_precision() == "highest"


def test_float32_convolutions_of_a_processor_keep_their_layout() -> None:
    convolution = nn.Conv2d(4, 8, 3)
    tuning.lay_out([convolution], CPU, torch.float32)
    assert convolution.weight.is_contiguous()
    tuning.lay_out([convolution], CPU, torch.bfloat16)
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_machine_without_a_compiler_is_told_what_to_install(tmp_path: Path) -> None:
    from torch._inductor import config

    tuning.start(CPU, "off")
    with (
        config.patch({"cpp.cxx": (None, str(tmp_path / "no-compiler"))}),
        pytest.raises(tuning.CompileUnavailableError, match=r"torch_compile is on.*install g\+\+"),
    ):
        tuning.start(CPU, "on")


@pytest.mark.parametrize(
    ("architecture", "built_for", "told"),
    [
        ("gfx90a:sramecc+:xnack-", ["gfx90a", "gfx942"], ""),
        ("gfx1100", [], ""),
        ("gfx1031", ["gfx1030", "gfx1100"], "HSA_OVERRIDE_GFX_VERSION=10.3.0"),
        ("gfx1103", ["gfx1100"], "HSA_OVERRIDE_GFX_VERSION=11.0.0"),
        ("gfx803", ["gfx90a"], "another GPU"),
    ],
)
def test_an_amd_gpu_without_kernels_says_whose_it_could_run(architecture: str, built_for: list[str], told: str) -> None:
    why = on_rocm.unsupported(architecture, built_for)
    assert told in why
    assert bool(why) == bool(told)


@pytest.mark.skipif(bool(on_cpu.compile_missing()), reason="there is no C++ compiler")
def test_a_compiled_encoder_sees_what_the_eager_one_sees() -> None:
    eager = TrocrModel(tiny_trocr.build())
    compiled = TrocrModel(tiny_trocr.build(), compile_for=CPU)
    with torch.inference_mode():
        for images in (1, 3):
            pixels = torch.randn(images, 1, tiny_trocr.HEIGHT, tiny_trocr.WIDTH)
            torch.testing.assert_close(compiled.states(pixels), eager.states(pixels), atol=1e-4, rtol=1e-4)
