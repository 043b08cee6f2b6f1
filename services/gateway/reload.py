"""Following the configuration file: a new one is checked and then used, a wrong one is not, and said to be wrong."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from services.gateway import config as configuration
from services.gateway.config import ConfigError, GatewayConfig

log = structlog.get_logger(__name__)

_DIGITS = 12


class Reloading:
    """Looks at the file every `interval_s` seconds (0: never) and has `apply` use what it says now.

    The contents are compared, not times: Kubernetes replaces a mounted ConfigMap by moving a link.

    digest and loaded_at: of what is in use; `loaded_at` in RFC 3339. error: why the file as it is now is not used.
    """

    def __init__(
        self,
        file: Path,
        text: bytes,
        *,
        interval_s: float,
        apply: Callable[[GatewayConfig], Awaitable[None]],
        registry: CollectorRegistry,
    ) -> None:
        self.file = file
        self.digest = _digest(text)
        self.loaded_at = _now()
        self.error = ""
        self._seen: bytes | None = text
        self._interval_s = interval_s
        self._apply = apply
        self._reloads = Counter(
            "inkwell_gateway_config_reloads",
            "Times that the configuration file had changed, by what became of it: applied or refused.",
            ["result"],
            registry=registry,
        )
        self._refused = Gauge(
            "inkwell_gateway_config_refused",
            "1 while the configuration file is wrong and what it said before is in use.",
            registry=registry,
        )
        for result in ("applied", "refused"):
            self._reloads.labels(result)

    async def run(self) -> None:
        """Look until cancelled."""
        while self._interval_s > 0:
            await asyncio.sleep(self._interval_s)
            await self.look()

    async def look(self) -> None:
        """Look once, and use what is new."""
        try:
            text = await asyncio.to_thread(configuration.read, self.file)
        except ConfigError as error:
            if self._seen is not None:  # said once
                self._seen = None
                self._refuse(str(error))
            return
        if text == self._seen:
            return
        self._seen = text
        if _digest(text) == self.digest:  # it was wrong, or away, and is as before
            self._settle()
            return
        try:
            await self._apply(configuration.parse(configuration.decode(text, self.file), name=str(self.file)))
        except ConfigError as error:
            self._refuse(str(error))
            return
        self.digest, self.loaded_at = _digest(text), _now()
        self._reloads.labels("applied").inc()
        self._settle()
        log.info("configuration applied", file=str(self.file), digest=self.digest)

    def _refuse(self, error: str) -> None:
        self.error = error
        self._refused.set(1)
        self._reloads.labels("refused").inc()
        log.error("configuration refused; the one before stays in use", error=error, digest=self.digest)

    def _settle(self) -> None:
        self.error = ""
        self._refused.set(0)


def _digest(text: bytes) -> str:
    return sha256(text).hexdigest()[:_DIGITS]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
