"""`python -m services.gateway check FILE`, and `inkwell gateway check FILE` on top of it."""

import subprocess
import sys
from pathlib import Path

import pytest

from services.gateway.check import check

FILE = """
pools:
  - {name: ocr-cuda, service: ocr, hardware: cuda, targets: ["dns:///ocr-cuda:50051"]}
  - {name: ocr-next, service: ocr, hardware: cuda, targets: ["dns:///ocr-next:50051"]}
  - {name: ocr-cpu, service: ocr, hardware: cpu, targets: ["10.0.0.1:50051"]}
defaults: {ocr: [cpu, rocm]}
routes:
  - {service: ocr, models: ["large-*"], only: [rocm]}
  - {service: ocr, methods: [Embed], prefer: [cpu]}
  - {service: ocr, weights: {ocr-cuda: 95, ocr-next: 5}}
  - {service: ocr, methods: [Recognize], prefer: [cuda]}
  - {service: diffusion, prefer: [cuda]}
"""


def test_it_says_what_the_file_does_and_what_in_it_does_nothing(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text(FILE)
    lines = [line.strip() for line in check(path)]
    assert lines[0] == f"{path}: ok, 3 pools, 5 routes"
    assert "ocr: cpu: ocr-cpu, then cuda: ocr-cuda ocr-next" in lines
    assert "diffusion: no pool, calls are refused" in lines
    assert [line for line in lines if line.startswith("warning")] == [
        "warning: routes[0].only: no pool of ocr has hardware rocm",
        "warning: routes[0]: every call that falls under it is refused",
        "warning: routes[3]: no call gets here, routes[2] takes them all",
        "warning: routes[4]: diffusion has no pool",
        "warning: defaults.ocr: no pool of ocr has hardware rocm",
    ]


@pytest.mark.parametrize("program", [["services.gateway"], ["inkwell", "gateway"]])
def test_the_commands_end_with_2_for_a_wrong_file_and_name_it(tmp_path: Path, program: list[str]) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text(FILE)

    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", *program, "check", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 pools, 5 routes" in done.stdout
    path.write_text(FILE.replace("hardware: cpu", "hardware: gpu"))
    done = run()
    assert (done.returncode, done.stdout) == (2, "")
    assert f"gateway: {path}: pools[2].hardware: 'gpu' is not a hardware label" in done.stderr
