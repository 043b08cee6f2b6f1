"""The gateway as its operators meet it: the command, its exit codes, its size."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import grpc
import psutil
import pytest

from tests.integration.test_gateway_routing import backends
from tests.support.backend import UNARY
from tests.support.gateway import pool


async def start(*arguments: str, **settings: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.gateway",
        *arguments,
        env={**os.environ, "INKWELL_GATEWAY_PORT": "0", **settings},
        stderr=asyncio.subprocess.PIPE,
    )


async def until_event(process: asyncio.subprocess.Process, event: str) -> dict[str, str]:
    """The first log line of that event."""
    assert process.stderr is not None
    while True:
        line = await process.stderr.readline()
        assert line, f"it ended before {event!r}"
        found: dict[str, str] = json.loads(line)
        if found["event"] == event:
            return found


@pytest.mark.parametrize("by", ["argument", "setting"])
async def test_it_serves_the_file_it_is_given_and_drains_on_sigterm(tmp_path: Path, by: str) -> None:
    async with backends(1) as (only,):
        path = tmp_path / "pools.yaml"
        path.write_text(json.dumps({"pools": [pool("reads", only)]}))
        if by == "argument":
            process = await start("--config", str(path))
        else:
            process = await start(INKWELL_GATEWAY_CONFIG=str(path))
        try:
            address = (await until_event(process, "listening"))["address"]
            async with grpc.aio.insecure_channel(address) as channel:
                while (await until_event(process, "endpoint"))["state"] != "ready":
                    pass
                assert await channel.unary_unary(UNARY)(b"a") == b"a"
            assert only.call_count == 1
            assert psutil.Process(process.pid).memory_info().rss < 150e6
        finally:
            process.send_signal(signal.SIGTERM)
            _, rest = await process.communicate()
        assert process.returncode == 0
        assert json.loads(rest.splitlines()[-1])["event"] == "stopped"


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        ("pools: [{name: a, service: ocr, hardware: gpu, targets: ['h:1']}]", {}, "pools[0].hardware: 'gpu' is not"),
        (None, {}, "cannot be read"),
        (
            "pools: [{name: a, service: ocr, hardware: cpu, targets: ['h:1']}]",
            {"INKWELL_GATEWAY_MAX_ATTEMPTS": "0"},
            "INKWELL_GATEWAY_MAX_ATTEMPTS: Input should be greater than or equal to 1",
        ),
    ],
)
async def test_what_is_wrong_with_its_configuration_is_said_before_it_serves(
    tmp_path: Path, text: str | None, settings: dict[str, str], expected: str
) -> None:
    path = tmp_path / "pools.yaml"
    if text is not None:
        path.write_text(text)
    process = await start("--config", str(path), **settings)
    _, said = await process.communicate()
    assert process.returncode == 2
    assert expected in said.decode()
    assert "Traceback" not in said.decode()
