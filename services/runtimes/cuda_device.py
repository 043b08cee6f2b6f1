"""The NVIDIA device that TensorRT builds for and runs on, asked of the driver itself: no torch, no long import."""

import ctypes
from dataclasses import dataclass
from pathlib import Path

_LIBRARY = "libcuda.so.1"
# CUdevice_attribute of cuda.h.
_CAPABILITY_MAJOR = 75
_CAPABILITY_MINOR = 76
# The kernel module's version, which the CUDA version below does not tell apart between bug fixes.
_DRIVER_VERSION = Path("/sys/module/nvidia/version")


@dataclass(frozen=True)
class CudaDevice:
    """The first device of this machine."""

    name: str  # for people, such as "NVIDIA L4"
    capability: tuple[int, int]  # compute capability, such as (8, 9)
    memory_bytes: int
    driver: str  # of the kernel module, such as "580.95.05", else the CUDA version that it speaks, such as "CUDA 13.0"

    @property
    def compute_capability(self) -> str:
        """As manifests write it: "8.9"."""
        return f"{self.capability[0]}.{self.capability[1]}"


class NoCudaDeviceError(Exception):
    """There is no NVIDIA device here, or none that answers; the message says what is missing."""


def find() -> CudaDevice:
    """The first CUDA device. Raises NoCudaDeviceError."""
    try:
        cuda = ctypes.CDLL(_LIBRARY)
    except OSError:
        raise NoCudaDeviceError(f"no NVIDIA driver: {_LIBRARY} cannot be loaded") from None
    _call(cuda, "cuInit", 0)
    count = ctypes.c_int()
    _call(cuda, "cuDeviceGetCount", ctypes.byref(count))
    if count.value == 0:
        raise NoCudaDeviceError("the NVIDIA driver is there, but no CUDA device is visible to this process")
    device = ctypes.c_int()
    _call(cuda, "cuDeviceGet", ctypes.byref(device), 0)
    name = ctypes.create_string_buffer(256)
    _call(cuda, "cuDeviceGetName", name, len(name), device)
    memory = ctypes.c_size_t()
    _call(cuda, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    capability = (_attribute(cuda, _CAPABILITY_MAJOR, device), _attribute(cuda, _CAPABILITY_MINOR, device))
    return CudaDevice(name.value.decode(errors="replace"), capability, memory.value, _driver(cuda))


def _attribute(cuda: ctypes.CDLL, attribute: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int()
    _call(cuda, "cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
    return value.value


def _driver(cuda: ctypes.CDLL) -> str:
    try:
        return _DRIVER_VERSION.read_text().strip()
    except OSError:  # Windows' subsystem for Linux has no such module
        version = ctypes.c_int()
        _call(cuda, "cuDriverGetVersion", ctypes.byref(version))
        # 1000 * major + 10 * minor, by cuda.h.
        return f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def _call(cuda: ctypes.CDLL, function: str, *arguments: object) -> None:
    code: int = getattr(cuda, function)(*arguments)
    if code:
        raise NoCudaDeviceError(f"the NVIDIA driver answered {function} with error {code} (CUresult of cuda.h)")
