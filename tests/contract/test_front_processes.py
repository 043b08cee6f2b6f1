"""What each service's front process may hold: it must start quickly and stay small."""

import subprocess
import sys

import psutil
import pytest

from services import local

HEAVY = ("torch", "transformers", "diffusers")


@pytest.mark.parametrize("service", ["ocr", "diffusion", "gateway"])
def test_the_front_process_loads_no_ml_library(service: str) -> None:
    program = f"import sys, services.{service}.__main__; print(*(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("service", ["ocr", "diffusion"])
def test_the_front_process_stays_small_while_its_engine_serves(fleet: dict[str, local.Service], service: str) -> None:
    assert psutil.Process(fleet[service].pid).memory_info().rss < 150e6
