"""Rate limits and used tokens that gateways share through Redis, and what becomes of them when it is gone."""

import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from tests.support import gateway as gateways
from tests.support.backend import UNARY, Backend
from tests.support.gateway import Gateway, pool
from tests.support.redis import Redis, redis
from tests.support.tokens import AUDIENCE, ISSUER, Issuer

KEY = "ik_" + "x" * 40


@pytest.fixture
async def backend() -> AsyncIterator[Backend]:
    started = await Backend().start()
    yield started
    await started.stop()


@pytest.fixture
async def server() -> AsyncIterator[Redis]:
    async with redis() as started:
        yield started


@pytest.fixture
def access(tmp_path: Path) -> str:
    path = tmp_path / "access.yaml"
    path.write_text(
        json.dumps(
            {
                "keys": [{"name": "scanner", "sha256": hashlib.sha256(KEY.encode()).hexdigest()}],
                "tokens": [{"name": "corp", "issuer": ISSUER, "audience": AUDIENCE, "keys": "jwks.json", "once": True}],
                "rules": [
                    {"callers": ["key/*"], "methods": ["*"], "limits": ["4/hour"]},
                    {"callers": ["corp/*"], "methods": ["*"]},
                ],
            }
        )
    )
    return str(path)


async def outcome(gateway: Gateway, token: str) -> str:
    """The code that a call ends with."""
    try:
        await gateway.channel.unary_unary(UNARY)(b"", metadata=(("authorization", f"Bearer {token}"),), timeout=60)
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return "OK"


def shared(gateway: Gateway) -> float | None:
    return gateway.server.metrics.registry.get_sample_value("inkwell_gateway_limits_shared")


async def test_gateways_count_together(backend: Backend, server: Redis, access: str) -> None:
    (Path(access).parent / "jwks.json").write_bytes(Issuer().jwks)
    settings: dict[str, Any] = {"access": access, "limits_redis": server.url}
    async with gateways.running(pool("a", backend), **settings) as one:
        assert [await outcome(one, KEY) for _ in range(2)] == ["OK"] * 2
        async with gateways.running(pool("a", backend), **settings) as other:
            assert [await outcome(other, KEY) for _ in range(3)] == ["OK", "OK", "RESOURCE_EXHAUSTED"]
        assert await outcome(one, KEY) == "RESOURCE_EXHAUSTED"
        assert shared(one) == 1


async def test_without_redis_each_counts_by_itself_until_it_is_back(
    backend: Backend, server: Redis, access: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.limits._REDIS_PAUSE_S", 0.0)
    (Path(access).parent / "jwks.json").write_bytes(Issuer().jwks)
    async with gateways.running(pool("a", backend), access=access, limits_redis=server.url) as gateway:
        assert await outcome(gateway, KEY) == "OK"
        await server.kill()
        with capture_logs() as logged:
            assert [await outcome(gateway, KEY) for _ in range(5)] == ["OK"] * 4 + ["RESOURCE_EXHAUSTED"]
        assert shared(gateway) == 0
        assert server.url not in repr(logged)
        await server.start()
        assert await outcome(gateway, KEY) == "OK"
        assert shared(gateway) == 1


async def test_a_token_is_good_for_one_gateway(backend: Backend, server: Redis, access: str) -> None:
    issuer = Issuer()
    issuer.write(Path(access).parent / "jwks.json")
    settings: dict[str, Any] = {"access": access, "limits_redis": server.url}
    async with (
        gateways.running(pool("a", backend), **settings) as one,
        gateways.running(pool("a", backend), **settings) as other,
    ):
        token = issuer.token(jti="1")
        assert await outcome(one, token) == "OK"
        assert await outcome(other, token) == "UNAUTHENTICATED"
        await server.kill()
        # It may have been used at the other one, so it is not let in, and may be tried again.
        assert await outcome(one, issuer.token(jti="2")) == "UNAVAILABLE"
