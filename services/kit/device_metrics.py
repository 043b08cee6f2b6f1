"""What Prometheus sees of the devices: memory, use, power and temperature of each GPU, else the memory of this pod.

GPUs are asked through the vendors' own libraries, imported when a server starts and only where the driver's device file
is: NVML (PyPI `nvidia-ml-py`) for NVIDIA, AMD SMI (`amdsmi`, of ROCm) for AMD. What a device cannot tell is left out.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

log = structlog.get_logger(__name__)

NVIDIA_FILE = Path("/dev/nvidiactl")
AMD_FILE = Path("/dev/kfd")
# Where a container sees its own group, of cgroup v2.
_GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Reading:
    """One device as it is now; None is what it does not tell."""

    device: str  # number, from 0; "host" for the pod's own memory
    hardware: str  # "cuda", "rocm" or "cpu"
    name: str  # for people, such as "NVIDIA L4"
    memory_bytes: int | None = None
    used_bytes: int | None = None
    busy_ratio: float | None = None  # of the last moments, 0 to 1
    power_watts: float | None = None
    temperature_celsius: float | None = None


class Devices(Protocol):
    """The devices of one vendor."""

    def read(self) -> list[Reading]:
        """All of them, now. Raises whatever the vendor's library does when the driver is gone."""


class Nvidia:
    """NVIDIA devices through NVML. Making it raises if there is no driver."""

    def __init__(self) -> None:
        self._nvml: Any = importlib.import_module("pynvml")
        self._nvml.nvmlInit()

    def read(self) -> list[Reading]:
        """See Devices."""
        return [self._one(number) for number in range(self._nvml.nvmlDeviceGetCount())]

    def _one(self, number: int) -> Reading:
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByIndex(number)
        # A part of a card (MIG) tells its memory, but neither power nor how busy it is.
        memory = self._told(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        percent = self._told(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        milliwatts = self._told(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        return Reading(
            str(number),
            "cuda",
            str(nvml.nvmlDeviceGetName(handle)),
            None if memory is None else int(memory.total),
            None if memory is None else int(memory.used),
            None if percent is None else percent / 100,
            None if milliwatts is None else milliwatts / 1000,
            self._told(lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))),
        )

    def _told(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except self._nvml.NVMLError_NotSupported:
            return None


class Amd:
    """AMD devices through AMD SMI. Making it raises if there is no driver."""

    def __init__(self) -> None:
        self._smi: Any = importlib.import_module("amdsmi")
        self._smi.amdsmi_init()

    def read(self) -> list[Reading]:
        """See Devices."""
        handles = self._smi.amdsmi_get_processor_handles()
        return [self._one(number, handle) for number, handle in enumerate(handles)]

    def _one(self, number: int, handle: Any) -> Reading:
        smi = self._smi
        vram = smi.AmdSmiMemoryType.VRAM
        percent = self._told(lambda: smi.amdsmi_get_gpu_activity(handle)["gfx_activity"])
        power = self._told(lambda: smi.amdsmi_get_power_info(handle)) or {}
        # Cards from the MI300 on tell the one, those before it the other.
        told = (power.get(key) for key in ("current_socket_power", "average_socket_power"))
        watts = next((value for value in told if _number(value)), None)
        sensor, metric = smi.AmdSmiTemperatureType.HOTSPOT, smi.AmdSmiTemperatureMetric.CURRENT
        celsius = self._told(lambda: smi.amdsmi_get_temp_metric(handle, sensor, metric))
        return Reading(
            str(number),
            "rocm",
            str(smi.amdsmi_get_gpu_asic_info(handle)["market_name"]),
            self._told(lambda: int(smi.amdsmi_get_gpu_memory_total(handle, vram))),
            self._told(lambda: int(smi.amdsmi_get_gpu_memory_usage(handle, vram))),
            percent / 100 if _number(percent) else None,
            None if watts is None else float(watts),
            float(celsius) if _number(celsius) else None,
        )

    def _told(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except self._smi.AmdSmiLibraryException:
            return None


class Host:
    """The memory that this pod may use, which is the device where models run on the processor."""

    def __init__(self, group: Path = _GROUP) -> None:
        self._group = group

    def read(self) -> list[Reading]:
        """See Devices."""
        machine = psutil.virtual_memory()
        total, used = int(machine.total), int(machine.total - machine.available)
        try:
            limit = (self._group / "memory.max").read_text().strip()
            if limit != "max" and int(limit) <= total:
                held = int((self._group / "memory.current").read_text())
                stat = dict(line.split() for line in (self._group / "memory.stat").read_text().splitlines())
                # Files that could be dropped at once are not counted, as the kubelet's working set does not.
                total, used = int(limit), held - int(stat.get("inactive_file", 0))
        except (OSError, ValueError):
            pass  # no group of its own: the machine it is
        return [Reading("host", "cpu", "CPU", total, used)]


def find(nvidia_file: Path = NVIDIA_FILE, amd_file: Path = AMD_FILE) -> list[Devices]:
    """The devices here: those of the vendors whose driver and library there are, else the pod's own memory."""
    found: list[Devices] = []
    makers: Sequence[tuple[Path, str, Callable[[], Devices]]] = (
        (nvidia_file, "nvidia-ml-py", Nvidia),
        (amd_file, "amdsmi", Amd),
    )
    for file, package, make in makers:
        if file.exists():
            try:
                found.append(make())
            except Exception as error:  # noqa: BLE001 - the libraries raise what they like, and serving goes on
                log.warning("no metrics of the GPU", driver=str(file), package=package, error=repr(error))
    return found or [Host()]


def register(registry: CollectorRegistry, devices: Sequence[Devices]) -> None:
    """Show the devices on the metrics page."""
    registry.register(_DeviceCollector(devices))


class _DeviceCollector(Collector):
    def __init__(self, devices: Sequence[Devices]) -> None:
        self._devices = devices
        self._failing = False

    def collect(self) -> Iterator[Metric]:
        info = GaugeMetricFamily(
            "inkwell_device_info", "Always 1; the labels name the device.", labels=["device", "hardware", "name"]
        )
        gauges = {
            "memory_bytes": _family("memory_bytes", "Memory of the device; on a CPU, what this pod may use."),
            "used_bytes": _family("memory_used_bytes", "Memory of the device in use, by whatever program."),
            "busy_ratio": _family("busy_ratio", "Share of the last moments in which the device computed, 0 to 1."),
            "power_watts": _family("power_watts", "Power that the device draws."),
            "temperature_celsius": _family("temperature_celsius", "Temperature of the device."),
        }
        for reading in self._read():
            info.add_metric([reading.device, reading.hardware, reading.name], 1)
            for attribute, gauge in gauges.items():
                value = getattr(reading, attribute)
                if value is not None:
                    gauge.add_metric([reading.device, reading.hardware], value)
        yield info
        yield from gauges.values()

    def _read(self) -> list[Reading]:
        readings: list[Reading] = []
        failing = False
        for devices in self._devices:
            try:
                readings += devices.read()
            except Exception as error:  # noqa: BLE001 - a card that fell off the bus must not take the page with it
                failing = True
                if not self._failing:
                    log.error("a GPU does not answer", error=repr(error))
        self._failing = failing
        return readings


def _family(name: str, documentation: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"inkwell_device_{name}", documentation, labels=["device", "hardware"])


def _number(value: Any) -> bool:
    # AMD SMI says "N/A" of what a card does not tell.
    return isinstance(value, int | float)
