"""JSON Web Tokens (RFC 7519): the keys of their issuers, and whether one is to be believed."""

import asyncio
import base64
import hashlib
import json
import time
import urllib.request
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import structlog
from joserfc import jwt
from joserfc.errors import ExpiredTokenError, JoseError
from joserfc.jwk import KeySet
from joserfc.jws import JWSRegistry

from services.gateway.access_file import TokenIssuer
from services.kit import faults
from services.kit.identity import is_name
from services.kit.tls import signature

log = structlog.get_logger(__name__)

# Keys behind a URL are asked for this often; issuers publish a new one well before they use it.
_REFRESH_S = 300.0
# A token of an unknown key is a reason to ask earlier, but anybody can make such tokens.
_ASK_AGAIN_S = 10.0
_FETCH_WITHIN_S = 5.0
_KEYS_BYTES_MOST = 1 << 20
_TOKEN_BYTES_MOST = 8192
_REMEMBERED_MOST = 4096

# Notes that a token was used, for so many seconds; answers False if it was before. Raises Fault if it cannot know.
Once = Callable[[str, float], Awaitable[bool]]


class Issuer:
    """The tokens of one issuer."""

    def __init__(self, config: TokenIssuer, folder: Path, *, once: Once) -> None:
        """folder: what a file of keys is relative to."""
        self.config = config
        self._url = config.keys if "://" in config.keys else ""
        self._path = folder / config.keys
        self._keys: dict[str | None, Any] = {}
        self._signature: Any = None
        self._asked_at = -_REFRESH_S
        self._asking = asyncio.Lock()
        self._once = once
        # Issuers add headers of their own; those that have to be understood (`crit`) are refused all the same.
        self._registry = JWSRegistry(algorithms=list(config.algorithms), strict_check_header=False)
        # Checking a signature costs as much as the rest of a call. By the token's hash, so that no token is kept.
        self._remembered: OrderedDict[bytes, tuple[str, float]] = OrderedDict()

    async def refresh(self) -> None:
        """Take up new keys if it is time to look; what is wrong is logged, and the keys that were read last stay."""
        if self._url:
            if time.monotonic() - self._asked_at >= _REFRESH_S:
                await self._ask()
            return
        seen = signature(self._path)
        if seen != self._signature:
            self._signature = seen
            try:
                self._take(self._path.read_bytes())
            except (OSError, ValueError) as error:
                log.error("keys cannot be used; the old ones stay", issuer=self.config.name, error=_said(error))

    async def _ask(self) -> None:
        async with self._asking:
            # Of several that wait for the same answer, one asks.
            if time.monotonic() - self._asked_at < _ASK_AGAIN_S:
                return
            self._asked_at = time.monotonic()
            try:
                self._take(await asyncio.to_thread(_fetch, self._url))
            except (OSError, ValueError) as error:
                log.error("keys cannot be had; the old ones stay", issuer=self.config.name, error=_said(error))

    def _take(self, content: bytes) -> None:
        try:
            found = KeySet.import_key_set(json.loads(content))
        except (JoseError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'expected a JWKS, {{"keys": [...]}}: {type(error).__name__}') from None
        keys = {key.kid: key for key in found if key.key_type != "oct"}
        if not keys:
            raise ValueError("it holds no public key")
        self._keys = keys
        self._remembered.clear()  # a key that was withdrawn must not go on working

    def known(self, hashed: bytes) -> str | None:
        """The name of the caller whose token has this SHA-256, if it was believed before and still is."""
        found = self._remembered.get(hashed)
        if found is None or time.time() >= found[1]:
            return None
        self._remembered.move_to_end(hashed)
        return found[0]

    async def caller(self, token: str, header: dict[str, Any]) -> str:
        """The name of the caller with this token; raises Fault that says what is wrong with it, but not the token."""
        claims = await self._verified(token, header)
        name = claims.get(self.config.claim)
        caller = f"{self.config.name}/{name}"
        if not isinstance(name, str) or not name or not is_name(caller):
            raise _invalid(f"its claim {self.config.claim!r} is no name of printable ASCII")
        ends = float(claims["exp"]) + self.config.leeway_s
        if self.config.once:
            await self._use_up(claims, ends)
            return caller
        self._remembered[hashlib.sha256(token.encode()).digest()] = (caller, ends)
        if len(self._remembered) > _REMEMBERED_MOST:
            self._remembered.popitem(last=False)
        return caller

    async def _use_up(self, claims: dict[str, Any], ends: float) -> None:
        jti = claims.get("jti")
        if not isinstance(jti, str) or not jti:
            raise _invalid("it has no 'jti', without which it could be used again")
        key = hashlib.sha256(f"{self.config.issuer}\n{jti}".encode()).hexdigest()
        if not await self._once(key, max(1.0, ends - time.time())):
            raise faults.unauthenticated("TOKEN_REPLAYED", "the token was used before; each is good for one call")

    async def _verified(self, token: str, header: dict[str, Any]) -> dict[str, Any]:
        config = self.config
        key = await self._key(header.get("kid"))
        try:
            decoded = jwt.decode(token, key, registry=self._registry)
            jwt.JWTClaimsRegistry(
                leeway=config.leeway_s,
                iss={"essential": True, "value": config.issuer},
                aud={"essential": True, "value": config.audience},
                exp={"essential": True},
            ).validate(decoded.claims)
        except ExpiredTokenError:
            raise faults.unauthenticated("TOKEN_EXPIRED", "the token has expired; get a new one") from None
        except (JoseError, ValueError, TypeError) as error:
            raise _invalid(_said(error)) from None
        claims: dict[str, Any] = decoded.claims
        return claims

    async def _key(self, kid: Any) -> Any:
        if kid is not None and not isinstance(kid, str):
            raise _invalid("its header's 'kid' is no text")
        if self._url and (not self._keys or kid not in self._keys):
            await self._ask()
        if not self._keys:
            raise faults.unavailable(
                "TOKEN_KEYS_UNAVAILABLE",
                f"the keys of {self.config.issuer} cannot be had, so its tokens cannot be checked",
                retry_after_ms=int(_ASK_AGAIN_S * 1000),
            )
        if kid is None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        if kid not in self._keys:
            raise _invalid("none of its issuer's keys signed it")
        return self._keys[kid]


def parts(token: str) -> tuple[dict[str, Any], str]:
    """The header and the claimed issuer of a token, neither of them checked; raises Fault if it is no JWT."""
    if len(token) > _TOKEN_BYTES_MOST:
        raise _invalid(f"it has {len(token)} characters, more than the limit of {_TOKEN_BYTES_MOST}")
    header, _, rest = token.partition(".")
    try:
        read, claims = _json(header), _json(rest.partition(".")[0])
    except ValueError:
        raise _invalid("it is neither a JWT nor an API key") from None
    return read, str(claims.get("iss", ""))


def _json(part: str) -> dict[str, Any]:
    try:
        found = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    except (ValueError, RecursionError):
        raise ValueError from None
    if not isinstance(found, dict):
        raise ValueError
    return found


def _invalid(why: str) -> faults.Fault:
    return faults.unauthenticated("TOKEN_INVALID", f"the token cannot be believed: {why}")


def _said(error: Exception) -> str:
    # joserfc says what is wrong without quoting more of a token than a name in it, which may be anything.
    return ascii(str(error) or type(error).__name__)[1:-1][:200]


def _fetch(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"Accept": "application/json"})
    with urllib.request.urlopen(request, timeout=_FETCH_WITHIN_S) as answer:
        content: bytes = answer.read(_KEYS_BYTES_MOST + 1)
    if len(content) > _KEYS_BYTES_MOST:
        raise ValueError(f"{url} answered with more than {_KEYS_BYTES_MOST} bytes")
    return content
