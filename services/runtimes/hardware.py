"""What hardware is here. Labels are the same everywhere: metrics, replies, the gateway's pools, Kubernetes."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import psutil

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hardware:
    """The device that models run on."""

    label: str  # "cuda", "rocm", "xpu", "mps" or "cpu"
    device: str  # what torch calls it, such as "cuda:0"
    name: str  # for people, such as "NVIDIA L4"
    memory_bytes: int  # on the device; for cpu, of the machine
    core_count: int  # CPU cores that this process may use
    compute_capability: str = ""  # of NVIDIA devices, such as "8.9"


def detect() -> Hardware:
    """Find the best device. Never raises: a machine with a broken driver is a cpu machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        import torch

        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            # ROCm builds of torch answer through the cuda namespace; torch.version.hip tells them apart.
            label = "rocm" if torch.version.hip else "cuda"
            capability = "" if torch.version.hip else f"{properties.major}.{properties.minor}"
            return Hardware(label, "cuda:0", properties.name, properties.total_memory, cores, capability)
        if hasattr(torch, "xpu") and torch.xpu.is_available():
            xpu = torch.xpu.get_device_properties(0)
            return Hardware("xpu", "xpu:0", xpu.name, xpu.total_memory, cores)
        if torch.backends.mps.is_available():
            return Hardware("mps", "mps", "Apple GPU", _machine_memory(), cores)
    except Exception:  # noqa: BLE001 - whatever a driver throws, the CPU still works
        log.warning("looking for a GPU failed; running on the CPU", exc_info=True)
    return Hardware("cpu", "cpu", "CPU", _machine_memory(), cores)


def _machine_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def free_memory(device: str) -> int:
    """Memory that is free now on a torch device, bytes; on the CPU within the container's limit if it has one."""
    if device.startswith("cuda"):
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    if device.startswith("xpu"):
        import torch

        free, _ = torch.xpu.mem_get_info(device)
        return int(free)
    free = int(psutil.virtual_memory().available)
    try:
        # Control groups version 2, as containers see their own.
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
        free = free if limit == "max" else max(0, min(free, int(limit) - int(used)))
    except (OSError, ValueError):
        pass
    if device.startswith("mps"):
        import torch

        # Of the machine's memory, what Metal lets a GPU have; more would be swapped (on_mps.py).
        free = min(free, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return max(0, free)
