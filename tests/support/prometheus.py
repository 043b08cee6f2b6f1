"""A real Prometheus and its promtool for tests: from PATH, or from the folder that INKWELL_PROMETHEUS names."""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.local import ROOT, free_ports

MONITORING = ROOT / "k8s" / "components" / "monitoring"


def binary(name: str) -> str:
    """Path of `prometheus` or `promtool`; skips the test where it is not installed."""
    found = shutil.which(name, path=os.environ.get("INKWELL_PROMETHEUS")) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is neither on PATH nor in the folder that INKWELL_PROMETHEUS names (Debian: prometheus)")
    return found


def promtool(*arguments: str, input: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run promtool; answers what came of it, whatever that was."""
    return subprocess.run(
        [binary("promtool"), *arguments], input=input, capture_output=True, text=True, timeout=60, check=False
    )


def build(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the component's build.py."""
    return subprocess.run(
        [sys.executable, str(MONITORING / "build.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def plain_rules(folder: Path) -> list[Path]:
    """Write the component's rules to a folder, as a Prometheus without operator reads them; answers the files."""
    done = build("plain", str(folder))
    assert done.returncode == 0, done.stderr
    return sorted(folder.glob("*.yaml"))


def rules() -> list[dict[str, Any]]:
    """Every recording rule and alert of the component."""
    files = [yaml.safe_load(path.read_text()) for path in sorted((MONITORING / "rules").glob("*.yaml"))]
    return [rule for file in files for group in file["spec"]["groups"] for rule in group["rules"]]


@dataclass
class Prometheus:
    """A running server."""

    port: int

    async def query(self, expr: str) -> list[dict[str, Any]]:
        """The result of an instant query: `metric` and `value` of each series. Raises AssertionError for a bad one."""

        def ask() -> Any:
            url = f"http://127.0.0.1:{self.port}/api/v1/query?{urllib.parse.urlencode({'query': expr})}"
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)

        try:
            answer = await asyncio.to_thread(ask)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{expr}: {error.read().decode()}") from None
        return list(answer["data"]["result"])

    async def values(self, expr: str, *labels: str) -> dict[tuple[str, ...], float]:
        """The values of an instant query by those labels."""
        return {
            tuple(series["metric"].get(label, "") for label in labels): float(series["value"][1])
            for series in await self.query(expr)
        }

    async def until(
        self, expr: str, *labels: str, holds: Callable[[dict[tuple[str, ...], float]], bool]
    ) -> dict[tuple[str, ...], float]:
        """The values of an instant query, once they are as they should be; raises AssertionError after a minute."""
        found: dict[tuple[str, ...], float] = {}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(60):
                while True:
                    found = await self.values(expr, *labels)
                    if holds(found):
                        return found
                    await asyncio.sleep(0.1)  # Prometheus tells nobody
        raise AssertionError(f"{expr}: {found}")


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=30) as answer:
            return bool(answer.status == 200)
    except OSError:  # of urllib too, when it answers that it is not
        return False


@contextlib.asynccontextmanager
async def prometheus(folder: Path, targets: dict[int, dict[str, str]]) -> AsyncIterator[Prometheus]:
    """A server that scrapes and applies the component's rules several times a second.

    targets: metrics ports, and what the PodMonitor would label each with.
    """
    program = binary("prometheus")
    files = plain_rules(folder / "rules")
    for path in files:
        content = yaml.safe_load(path.read_text())
        for group in content["groups"]:
            group["interval"] = "200ms"
        path.write_text(yaml.safe_dump(content))
    config = {
        "global": {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "200ms"},
        "rule_files": [str(path) for path in files],
        "scrape_configs": [
            {
                "job_name": "pods",
                "static_configs": [
                    {"targets": [f"127.0.0.1:{port}"], "labels": labels} for port, labels in targets.items()
                ],
            }
        ],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    with (folder / "prometheus.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            program,
            f"--config.file={folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--enable-feature=exemplar-storage",
            stdout=log,
            stderr=log,
        )
    server = Prometheus(port)
    try:
        async with asyncio.timeout(60):
            while True:
                assert process.returncode is None, (folder / "prometheus.log").read_text()
                if await asyncio.to_thread(_is_ready, port) and await server.query("up"):
                    break
                await asyncio.sleep(0.1)  # it does not say when it is ready
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
