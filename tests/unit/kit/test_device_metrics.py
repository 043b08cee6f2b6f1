"""Devices by the vendors' libraries, which are stood in for where there is no card: what they say becomes series."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from structlog.testing import capture_logs

from services.kit import device_metrics
from services.kit.device_metrics import Amd, Host, Nvidia, Reading

NOWHERE = Path("/nonexistent")


class Nvml:
    """Two cards, the second of which is a part of one (MIG) and tells its memory only."""

    NVMLError_NotSupported = pynvml.NVMLError_NotSupported
    NVML_TEMPERATURE_GPU = pynvml.NVML_TEMPERATURE_GPU
    lost = False

    def nvmlInit(self) -> None: ...  # noqa: N802 - the names are NVML's

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        if self.lost:
            raise pynvml.NVMLError_GpuIsLost
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        return ("NVIDIA L4", "NVIDIA H100 MIG 1g.10gb")[handle]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(total=24 << 30, used=(6 << 30) + handle)

    def _of_a_whole_card(self, handle: int, value: Any) -> Any:
        if handle == 1:
            raise self.NVMLError_NotSupported
        return value

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:  # noqa: N802
        return self._of_a_whole_card(handle, SimpleNamespace(gpu=35, memory=10))

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        return int(self._of_a_whole_card(handle, 61_500))

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:  # noqa: N802
        assert sensor == self.NVML_TEMPERATURE_GPU
        return int(self._of_a_whole_card(handle, 48))


class AmdSmiLibraryException(Exception):  # noqa: N818 - the name is AMD SMI's
    pass


class Smi:
    """An MI300X and a card from before, which tells its power under another name and neither heat nor use."""

    AmdSmiLibraryException = AmdSmiLibraryException
    AmdSmiMemoryType = SimpleNamespace(VRAM="vram")
    AmdSmiTemperatureType = SimpleNamespace(HOTSPOT="hotspot")
    AmdSmiTemperatureMetric = SimpleNamespace(CURRENT="current")

    def amdsmi_init(self) -> None: ...

    def amdsmi_get_processor_handles(self) -> list[str]:
        return ["new", "old"]

    def amdsmi_get_gpu_asic_info(self, handle: str) -> dict[str, Any]:
        return {"market_name": {"new": "AMD Instinct MI300X", "old": "AMD Instinct MI210"}[handle]}

    def amdsmi_get_gpu_memory_total(self, handle: str, kind: str) -> int:
        assert kind == "vram"
        return 64 << 30

    def amdsmi_get_gpu_memory_usage(self, handle: str, kind: str) -> int:
        return 1 << 30

    def amdsmi_get_gpu_activity(self, handle: str) -> dict[str, Any]:
        return {"gfx_activity": 80 if handle == "new" else "N/A"}

    def amdsmi_get_power_info(self, handle: str) -> dict[str, Any]:
        if handle == "new":
            return {"current_socket_power": 300, "average_socket_power": "N/A"}
        return {"current_socket_power": "N/A", "average_socket_power": 90}

    def amdsmi_get_temp_metric(self, handle: str, sensor: str, metric: str) -> int:
        if handle == "old":
            raise AmdSmiLibraryException
        return 55


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    stand_in = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", stand_in)
    return stand_in


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    """The file by which a driver is known."""
    file = tmp_path / "driver"
    file.touch()
    return file


def page(devices: list[device_metrics.Devices]) -> dict[str, float]:
    registry = CollectorRegistry()
    device_metrics.register(registry, devices)
    lines = [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_what_nvidia_cards_tell(nvml: Nvml, driver: Path) -> None:
    card, part = 'device="0",hardware="cuda"', 'device="1",hardware="cuda"'
    assert page(device_metrics.find(driver, NOWHERE)) == {
        f'inkwell_device_info{{{card},name="NVIDIA L4"}}': 1,
        f'inkwell_device_info{{{part},name="NVIDIA H100 MIG 1g.10gb"}}': 1,
        f"inkwell_device_memory_bytes{{{card}}}": 24 << 30,
        f"inkwell_device_memory_bytes{{{part}}}": 24 << 30,
        f"inkwell_device_memory_used_bytes{{{card}}}": 6 << 30,
        f"inkwell_device_memory_used_bytes{{{part}}}": (6 << 30) + 1,
        f"inkwell_device_busy_ratio{{{card}}}": 0.35,
        f"inkwell_device_power_watts{{{card}}}": 61.5,
        f"inkwell_device_temperature_celsius{{{card}}}": 48,
    }


def test_the_stand_in_has_nothing_that_the_real_library_lacks() -> None:
    stood_in = {name for name in vars(Nvml) if name.lower().startswith("nvml")}
    assert {name for name in stood_in if not hasattr(pynvml, name)} == set()
    assert {field for field, _ in pynvml.c_nvmlMemory_t._fields_} >= {"total", "used"}
    assert "gpu" in {field for field, _ in pynvml.c_nvmlUtilization_t._fields_}


def test_what_amd_cards_tell(monkeypatch: pytest.MonkeyPatch, driver: Path) -> None:
    monkeypatch.setitem(sys.modules, "amdsmi", Smi())
    (devices,) = device_metrics.find(NOWHERE, driver)
    assert isinstance(devices, Amd)
    new, old = devices.read()
    assert new == Reading("0", "rocm", "AMD Instinct MI300X", 64 << 30, 1 << 30, 0.8, 300.0, 55.0)
    assert old == Reading("1", "rocm", "AMD Instinct MI210", 64 << 30, 1 << 30, None, 90.0, None)


def test_a_card_that_is_lost_takes_its_series_with_it_and_not_the_page(nvml: Nvml) -> None:
    registry = CollectorRegistry()
    device_metrics.register(registry, [Nvidia(), Host(NOWHERE)])
    nvml.lost = True
    with capture_logs() as logs:
        for _ in range(2):
            found = generate_latest(registry).decode()
    assert 'device="0"' not in found
    assert 'inkwell_device_memory_bytes{device="host",hardware="cpu"}' in found
    assert [line["event"] for line in logs] == ["a GPU does not answer"]  # once, and not at every scrape


def test_a_driver_without_its_library_is_told_and_the_service_starts(driver: Path) -> None:
    # The real library, on a machine without the driver's own.
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is an NVIDIA driver here")
    with capture_logs() as logs:
        (devices,) = device_metrics.find(driver, NOWHERE)
    assert isinstance(devices, Host)
    assert [(line["event"], line["package"]) for line in logs] == [("no metrics of the GPU", "nvidia-ml-py")]


def test_without_a_card_it_is_the_machines_memory() -> None:
    (reading,) = Host(NOWHERE).read()
    assert (reading.hardware, reading.memory_bytes) == ("cpu", psutil.virtual_memory().total)
    assert reading.used_bytes is not None
    assert 0 < reading.used_bytes < psutil.virtual_memory().total


def test_in_a_container_it_is_the_containers(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\nfile 400000\ninactive_file 300000\n")
    (reading,) = Host(tmp_path).read()
    # What the kernel would drop at once is free.
    assert (reading.memory_bytes, reading.used_bytes) == (1_000_000, 600_000)


def test_a_container_without_a_limit_has_the_machines(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (reading,) = Host(tmp_path).read()
    assert reading.memory_bytes == psutil.virtual_memory().total
