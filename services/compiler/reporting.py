"""What the compiler says of itself to whoever routes to it."""

import asyncio
import importlib.util
import os
from pathlib import Path

import psutil

from inkwell.endpoint.v1 import endpoint_pb2
from services.compiler import catalog
from services.compiler.compiling import Compiler
from services.compiler.settings import Settings
from services.kit import report
from services.kit.device import Device
from services.runtimes.artifacts.manifest import RUNTIME_OF
from services.runtimes.cuda_device import NoCudaDeviceError, find

# The kernel driver's device of AMD GPUs, which says so without the seconds that importing torch takes.
_ROCM_DEVICE = Path("/dev/kfd")


async def describe(compiler: Compiler, settings: Settings) -> endpoint_pb2.Report:
    """What this machine can build for, the models it knows, and where its operations are."""
    device, names = await asyncio.to_thread(lambda: (_device(compiler), sorted(catalog.sources(settings))))
    return endpoint_pb2.Report(
        hardware=report.hardware(device),
        runtimes=device.runtimes,
        models=[endpoint_pb2.Model(name=name) for name in names],
        operations_store=compiler.operations.store_id,
    )


def _device(compiler: Compiler) -> Device:
    runtimes = tuple(RUNTIME_OF[target] for target, (_, missing) in compiler.targets().items() if not missing)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        cuda = find()
    except NoCudaDeviceError:
        label = "rocm" if _ROCM_DEVICE.exists() and importlib.util.find_spec("torch") else "cpu"
        return Device(label, label.upper(), psutil.virtual_memory().total, cores, "", runtimes)
    return Device("cuda", cuda.name, cuda.memory_bytes, cores, cuda.compute_capability, runtimes)
