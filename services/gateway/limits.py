"""How often callers may call: counted here, or in a Redis that several gateways share.

While Redis cannot be asked, each gateway counts by itself, so that a caller gets at most as many calls as there are
gateways times its limit, and nobody is locked out.
"""

import asyncio
import importlib.util
import math
import time
from collections.abc import Sequence
from typing import Any

import limits
import structlog
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from prometheus_client import CollectorRegistry, Gauge

from services.kit import faults

log = structlog.get_logger(__name__)

# A store that does not answer within this time is no help to a call that is to be refused within milliseconds.
_REDIS_WITHIN_S = 0.25
# After a failure, Redis is left alone for so long; calls that come meanwhile lose no time.
_REDIS_PAUSE_S = 2.0
# Tokens that are good once: as many are remembered here, until they expire. About 200 bytes each.
_USED_MOST = 100_000


class Limiter:
    """Counts calls, and tokens that are good once. On one event loop."""

    def __init__(self, redis_url: str, registry: CollectorRegistry) -> None:
        """redis_url: "redis://host:6379/0", "rediss://…" with TLS, or empty. Raises ValueError if it is none of these.

        The URL is never logged: it may hold a password.
        """
        self._near = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._far: SlidingWindowCounterRateLimiter | None = None
        self._redis: Any = None
        self._paused_until = 0.0
        self._used: dict[str, float] = {}
        self._shared = Gauge(
            "inkwell_gateway_limits_shared",
            "1 while rate limits are counted in Redis with the other gateways, 0 while this one counts by itself.",
            registry=registry,
        )
        if redis_url:
            if importlib.util.find_spec("redis") is None:
                raise ValueError("this takes the package redis: pip install 'inkwell[redis]'")
            import redis.asyncio

            within = {"socket_timeout": _REDIS_WITHIN_S, "socket_connect_timeout": _REDIS_WITHIN_S}
            try:
                pool = redis.asyncio.ConnectionPool.from_url(redis_url, **within)
            except ValueError:
                raise ValueError("expected redis://HOST:PORT/NUMBER or rediss://…") from None
            self._redis = redis.asyncio.Redis(connection_pool=pool)
            # The pool goes through to the client, as limits documents, but for its types.
            shared: Any = {"connection_pool": pool}
            storage = RedisStorage("async+redis://", implementation="redispy", **shared)
            self._far = SlidingWindowCounterRateLimiter(storage)
            self._shared.set(1)

    async def close(self) -> None:
        """Close the connection to Redis."""
        if self._redis is not None:
            await self._redis.connection_pool.aclose()

    async def hit(self, rates: Sequence[limits.RateLimitItem], *, rule: str, caller: str) -> None:
        """Count a call of the caller; raises Fault (RATE_LIMITED) if it is one too many of any of the rates."""
        for rate in rates:
            allowed, wait_s = await self._asked(rate, rule, caller)
            if not allowed:
                raise faults.overloaded(
                    "RATE_LIMITED",
                    f"{caller} may call {rate.amount} times in {_window(rate)}",
                    retry_after_ms=math.ceil(wait_s * 1000),
                    limit=str(rate),
                )

    async def _asked(self, rate: limits.RateLimitItem, rule: str, caller: str) -> tuple[bool, float]:
        if self._far is not None and self._reachable():
            try:
                async with asyncio.timeout(_REDIS_WITHIN_S):
                    answer = await _hit(self._far, rate, rule, caller)
            except Exception as error:  # noqa: BLE001 - of redis, of limits, of the network: all mean the same here
                self._failed(error)
            else:
                self._shared.set(1)
                return answer
        return await _hit(self._near, rate, rule, caller)

    async def once(self, key: str, seconds: float) -> bool:
        """Note that the key was used, for so long; False if it was before.

        Raises Fault if that cannot be known: with Redis away another gateway may have seen it.
        """
        if self._redis is None:
            return self._once_near(key, seconds)
        if self._reachable():
            try:
                async with asyncio.timeout(_REDIS_WITHIN_S):
                    return bool(await self._redis.set(f"inkwell:used:{key}", 1, nx=True, ex=math.ceil(seconds)))
            except Exception as error:  # noqa: BLE001 - as above
                self._failed(error)
        raise faults.unavailable(
            "TOKEN_CHECK_UNAVAILABLE",
            "the store that says whether a token was used before cannot be asked",
            retry_after_ms=int(_REDIS_PAUSE_S * 1000),
        )

    def _once_near(self, key: str, seconds: float) -> bool:
        now = time.time()
        if len(self._used) >= _USED_MOST:
            self._used = {used: ends for used, ends in self._used.items() if ends > now}
            if len(self._used) >= _USED_MOST:
                raise faults.overloaded(
                    "TOO_MANY_TOKENS", f"{_USED_MOST} tokens that are good once were used", retry_after_ms=1000
                )
        if self._used.get(key, 0.0) > now:
            return False
        self._used[key] = now + seconds
        return True

    def _reachable(self) -> bool:
        return time.monotonic() >= self._paused_until

    def _failed(self, error: Exception) -> None:
        # Said by type only: the text may quote the URL.
        log.warning("redis cannot be asked; this gateway counts by itself", error=type(error).__name__)
        self._paused_until = time.monotonic() + _REDIS_PAUSE_S
        self._shared.set(0)


async def _hit(
    limiter: SlidingWindowCounterRateLimiter, rate: limits.RateLimitItem, rule: str, caller: str
) -> tuple[bool, float]:
    if await limiter.hit(rate, rule, caller):
        return True, 0.0
    stats = await limiter.get_window_stats(rate, rule, caller)
    return False, max(0.001, stats.reset_time - time.time())


def _window(rate: limits.RateLimitItem) -> str:
    seconds = rate.get_expiry()
    return "a second" if seconds == 1 else f"{seconds} seconds"
