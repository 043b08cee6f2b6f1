"""What a TensorRT session refuses, and in what words. Engines themselves run on CUDA devices only."""

from pathlib import Path

import msgspec
import pytest
import torch

from services.compiler.targets.tensorrt import EngineNote
from services.runtimes import cuda_device
from services.runtimes.hardware import Hardware
from services.runtimes.sessions.interface import HardwareMissingError, SessionError, SessionOptions
from services.runtimes.sessions.tensorrt_session import TensorrtSession, require_same

OPTIONS = SessionOptions(Hardware("cpu", "cpu", "CPU", 0, 1))


def engine(folder: Path, tensorrt: str, capability: str) -> Path:
    """A file with the note that the compiler writes beside an engine."""
    file = folder / "model.plan"
    file.write_bytes(b"an engine")
    note = EngineNote(tensorrt, capability, "NVIDIA L4", "0" * 64)
    (folder / "model.plan.json").write_bytes(msgspec.json.encode(note))
    return file


@pytest.mark.parametrize(
    ("tensorrt", "capability", "told"),
    [
        ("10.15.1.29", "8.9", r"built by TensorRT 10\.15\.1\.29 for compute capability 8\.9; here are 11\.4\.0\.106"),
        ("11.4.0.106", "7.5", r"for compute capability 7\.5; here are 11\.4\.0\.106 and 8\.9"),
    ],
)
def test_an_engine_of_another_version_or_device_says_how_to_make_one(
    tmp_path: Path, tensorrt: str, capability: str, told: str
) -> None:
    with pytest.raises(SessionError, match=told) as caught:
        require_same(engine(tmp_path, tensorrt, capability), "11.4.0.106", "8.9")
    assert "inkwell compile MODEL --to tensorrt" in str(caught.value)


def test_an_engine_of_this_version_and_device_is_taken(tmp_path: Path) -> None:
    require_same(engine(tmp_path, "11.4.0.106", "8.9"), "11.4.0.106", "8.9")
    (tmp_path / "model.plan.json").unlink()
    require_same(tmp_path / "model.plan", "11.4.0.106", "8.9")  # TensorRT itself decides


def test_a_broken_note_is_named(tmp_path: Path) -> None:
    file = engine(tmp_path, "11.4.0.106", "8.9")
    (tmp_path / "model.plan.json").write_bytes(b"{")
    with pytest.raises(SessionError, match=r"model\.plan\.json: cannot be read"):
        require_same(file, "11.4.0.106", "8.9")


def test_an_engine_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="there is no such file"):
        TensorrtSession(tmp_path / "model.plan", OPTIONS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_cuda_device_the_missing_driver_is_named(tmp_path: Path) -> None:
    with pytest.raises(HardwareMissingError, match="TensorRT engines run on CUDA devices only: no NVIDIA driver"):
        TensorrtSession(engine(tmp_path, "11.4.0.106", "8.9"), OPTIONS)
    with pytest.raises(cuda_device.NoCudaDeviceError, match=r"libcuda\.so\.1 cannot be loaded"):
        cuda_device.find()
