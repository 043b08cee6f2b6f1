"""What a service computes on, as engines tell it to their front process and servers to whoever routes to them."""

import msgspec


class Device(msgspec.Struct, frozen=True):
    """One device and what can run models on it."""

    label: str = ""  # "cuda", "rocm", "xpu", "mps", "directml" or "cpu"; empty while nothing is known
    name: str = ""  # for people, such as "NVIDIA L4"
    memory_bytes: int = 0  # of the device; for cpu, of the machine
    core_count: int = 0  # CPU cores that the process may use
    compute_capability: str = ""  # of NVIDIA devices, such as "8.9"
    runtimes: tuple[str, ...] = ()  # such as ("torch", "onnxruntime")
