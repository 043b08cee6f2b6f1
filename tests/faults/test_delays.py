"""A connection on which everything takes five seconds longer, each way, between any two processes.

Nobody waits for these seconds: calls end by deadlines shorter than that, or the delay ends when a test has seen it.
"""

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from services.gateway.endpoint import State
from tests.faults.test_connections import (
    GONE,
    KINDS,
    LATE,
    QUICK,
    assert_nothing_is_left,
    assert_recovers,
    behind_proxy,
    caller_behind_proxy,
    held,
    start,
)
from tests.faults.test_gateway import ask, call_to_end
from tests.integration.test_gateway import detail, outcome
from tests.integration.test_gateway_routing import backends
from tests.support.backend import UNARY, echo
from tests.support.fault_proxy import fault_proxy
from tests.support.gateway import pool, running
from tests.support.redis import redis
from tests.support.tokens import AUDIENCE, ISSUER, Issuer, KeyServer

DELAY_S = 5.0
KEY = "ik_" + "x" * 40


def late(kind: str, channel: grpc.aio.Channel) -> Any:
    """A call whose deadline is long before the delay is over."""
    call = start(channel, kind, timeout=0.7)
    return call_to_end(call) if kind != "unary" else call


@pytest.mark.parametrize("kind", KINDS)
async def test_between_gateway_and_service_a_call_ends_by_its_deadline(kind: str) -> None:
    async with behind_proxy() as (gateway, proxy, backend):
        proxy.delay_s = DELAY_S
        assert (await outcome(late(kind, gateway.channel))).code() is LATE
        await assert_nothing_is_left(gateway)
        await assert_recovers(gateway, proxy, backend)


@pytest.mark.parametrize("kind", KINDS)
async def test_between_gateway_and_service_a_call_that_has_the_time_is_answered_and_done_once(kind: str) -> None:
    async with behind_proxy() as (gateway, proxy, backend):
        proxy.delay_s = DELAY_S
        answer = asyncio.create_task(ask(gateway, kind))
        await proxy.delayed.wait()
        await proxy.heal()
        assert b"".join(await answer) == b"ab"
        assert backend.call_count == 1
        await assert_nothing_is_left(gateway)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_service_too_slow_to_answer_probes_is_given_up_and_its_calls_are_done_elsewhere(kind: str) -> None:
    async with (
        backends(2) as (far, near),
        fault_proxy(far.address) as proxy,
        running(pool("ocr-cpu", proxy, near), unchecked=QUICK) as gateway,
    ):
        await near.set_ready(False)
        await gateway.until_state(near, State.NOT_READY)
        far.behaviour = held
        answer = asyncio.create_task(ask(gateway, kind))  # without a deadline
        await far.entered.wait()
        await near.set_ready(True)
        await gateway.until_state(near, State.READY)
        proxy.delay_s = DELAY_S
        async with asyncio.timeout(20):
            assert b"".join(await answer) == b"ab"
            await gateway.until(lambda: gateway.endpoint(proxy).state is not State.READY)
        await assert_nothing_is_left(gateway)
        await assert_recovers(gateway, proxy, far)


async def test_a_service_that_takes_so_long_to_connect_to_is_unreachable_and_comes_back_by_itself() -> None:
    async with backends(1) as (backend,), fault_proxy(backend.address) as proxy:
        proxy.delay_s = DELAY_S
        async with running(pool("ocr-cpu", proxy), wait=False, connect_timeout_s=0.3) as gateway:
            async with asyncio.timeout(20):
                await gateway.until(
                    lambda: (
                        bool(gateway.fleet.pools[0].endpoints) and gateway.endpoint(proxy).state is State.UNREACHABLE
                    )
                )
            error = await outcome(gateway.channel.unary_unary(UNARY)(b"a", timeout=10))
            assert error.code() is GONE
            assert detail(error, error_details_pb2.ErrorInfo()).reason == "NO_READY_ENDPOINT"
            assert detail(error, error_details_pb2.RetryInfo()).retry_delay.ToMilliseconds() > 0
            await assert_recovers(gateway, proxy, backend)


@pytest.mark.parametrize("kind", KINDS)
async def test_between_caller_and_gateway_a_call_ends_by_its_deadline(kind: str) -> None:
    async with caller_behind_proxy() as (gateway, channel, proxy, backend):
        assert await channel.unary_unary(UNARY)(b"before", timeout=15) == b"before"
        backend.behaviour = held
        proxy.delay_s = DELAY_S
        assert (await outcome(late(kind, channel))).code() is LATE
        # It arrives only now, and behind it that nobody waits for it any more.
        await proxy.heal()
        backend.behaviour = echo
        assert await channel.unary_unary(UNARY)(b"after", timeout=15) == b"after"
        await assert_nothing_is_left(gateway)


async def test_between_gateway_and_redis_calls_are_counted_here_until_it_answers_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.limits._REDIS_PAUSE_S", 0.0)
    access = tmp_path / "access.yaml"
    access.write_text(
        json.dumps(
            {
                "keys": [{"name": "scanner", "sha256": hashlib.sha256(KEY.encode()).hexdigest()}],
                "rules": [{"callers": ["key/*"], "methods": ["*"], "limits": ["2/hour"]}],
            }
        )
    )
    shown = (("authorization", f"Bearer {KEY}"),)
    async with (
        redis() as server,
        fault_proxy(f"127.0.0.1:{server.port}") as proxy,
        backends(1) as (backend,),
        running(pool("a", backend), access=str(access), limits_redis=f"redis://{proxy.address}/0") as gateway,
    ):
        shared = gateway.server.metrics.registry.get_sample_value
        call = gateway.channel.unary_unary(UNARY)
        assert await call(b"1", metadata=shown, timeout=DELAY_S) == b"1"
        proxy.delay_s = DELAY_S
        # Of its own it has counted none yet.
        for message in (b"2", b"3"):
            assert await call(message, metadata=shown, timeout=DELAY_S) == message
        assert shared("inkwell_gateway_limits_shared") == 0
        error = await outcome(call(b"4", metadata=shown, timeout=DELAY_S))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await proxy.heal()
        await outcome(call(b"5", metadata=shown, timeout=DELAY_S))
        assert shared("inkwell_gateway_limits_shared") == 1


async def test_between_gateway_and_the_issuer_of_tokens_its_keys_are_away_until_they_were_had_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.tokens._FETCH_WITHIN_S", 0.3)
    monkeypatch.setattr("services.gateway.tokens._ASK_AGAIN_S", 0.0)
    issuer = Issuer()
    access = tmp_path / "access.yaml"
    with KeyServer(issuer).running() as server:
        _, _, place = server.url.partition("//")
        address, _, path = place.partition("/")
        async with fault_proxy(address) as proxy:
            keys = f"http://{proxy.address}/{path}"
            access.write_text(
                json.dumps(
                    {
                        "keys": [{"name": "scanner", "sha256": hashlib.sha256(KEY.encode()).hexdigest()}],
                        "tokens": [{"name": "corp", "issuer": ISSUER, "audience": AUDIENCE, "keys": keys}],
                        "rules": [{"callers": ["*"], "methods": ["*"]}],
                    }
                )
            )
            proxy.delay_s = DELAY_S
            async with backends(1) as (backend,), running(pool("a", backend), access=str(access)) as gateway:
                call = gateway.channel.unary_unary(UNARY)
                token = (("authorization", f"Bearer {issuer.token()}"),)
                error = await outcome(call(b"a", metadata=token, timeout=15))
                assert error.code() is GONE
                assert detail(error, error_details_pb2.ErrorInfo()).reason == "TOKEN_KEYS_UNAVAILABLE"
                assert await call(b"b", metadata=(("authorization", f"Bearer {KEY}"),), timeout=15) == b"b"
                await proxy.heal()
                assert await call(b"c", metadata=token, timeout=15) == b"c"
                proxy.delay_s = DELAY_S
                # They are kept, so nobody is asked.
                assert await call(b"d", metadata=token, timeout=DELAY_S) == b"d"
                await assert_nothing_is_left(gateway)
