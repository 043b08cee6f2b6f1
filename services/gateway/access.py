"""Who may call: finds out who makes a call, and keeps to what the access file allows them.

In order, for every call but those about health: metadata that only a gateway may set is refused; the caller is known
by a token or key in `authorization`, else by the certificate of the connection; the first rule of the file that has
the caller and the method decides; its rate limits are counted. Later on the way, the rule's models are looked for in
the requests, and its pools are all that may serve.
"""

import asyncio
import contextlib
import contextvars
import functools
import hashlib
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import grpc
import limits
import structlog
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message
from prometheus_client import CollectorRegistry, Counter, Gauge

from inkwell.channel import REQUEST_ID_KEY as REPEATED_ID_KEY
from services.gateway import access_file, tokens
from services.gateway.access_file import ANONYMOUS, CERTIFICATE, KEY, AccessFile, Rule, matches, method_name
from services.gateway.config import ConfigError
from services.gateway.limits import Limiter
from services.gateway.metadata import Metadata, Pair
from services.gateway.methods import METHODS, Method
from services.gateway.settings import Settings
from services.kit import faults
from services.kit.boundary import REQUEST_ID_KEY
from services.kit.call import PRIORITY_KEY, received
from services.kit.faults import Fault
from services.kit.identity import CALLER_KEY, certificate_name, current_caller
from services.kit.tls import signature

log = structlog.get_logger(__name__)

AUTHORIZATION = "authorization"
# Two of these would leave it to chance which one counts, here and at the service.
_SINGLE = frozenset((AUTHORIZATION, PRIORITY_KEY, REQUEST_ID_KEY, REPEATED_ID_KEY))
_LOOK_S = 1.0

P = TypeVar("P")

_rule: contextvars.ContextVar["_Rule | None"] = contextvars.ContextVar("inkwell_rule", default=None)


@dataclass(frozen=True, slots=True)
class _Rule:
    name: str
    rule: Rule
    rates: tuple[limits.RateLimitItem, ...]


@dataclass(frozen=True, slots=True)
class _Policy:
    """The access file, made ready."""

    rules: tuple[_Rule, ...]
    issuers: dict[str, tokens.Issuer]  # by `iss`
    keys: dict[bytes, str]  # names by SHA-256


class Access:
    """Decides over the calls of one gateway. `guard` is for `ServiceServer`.

    Without an access file everybody may call, and is known by the certificate of their connection if there is one.
    Raises ConfigError for a file that cannot be used.
    """

    def __init__(self, settings: Settings, registry: CollectorRegistry) -> None:
        self._path = settings.access_path
        self._certificates = settings.tls_folder is not None and settings.tls_clients
        try:
            self._limiter = Limiter(settings.limits_redis.get_secret_value(), registry)
        except ValueError as error:
            raise ConfigError(f"INKWELL_GATEWAY_LIMITS_REDIS: {error}") from None
        self._policy: _Policy | None = None
        self._signature: Any = None
        self._refused = Counter(
            "inkwell_gateway_refused_access", "Calls refused by the access rules.", ["reason"], registry=registry
        )
        self._wrong = Gauge(
            "inkwell_gateway_access_file_wrong",
            "1 while the access file cannot be used, and the one that was read before is kept to.",
            registry=registry,
        )
        self._alone = settings.processes == 1 or bool(settings.limits_redis.get_secret_value())
        if self._path is not None:
            self._signature = signature(self._path)
            self._policy = self._made(access_file.load(self._path), self._path)

    def _made(self, file: AccessFile, path: Path) -> _Policy:
        if not self._alone and any(issuer.once for issuer in file.tokens):
            raise ConfigError(
                f"{path}: tokens: 'once' with several PROCESSES takes INKWELL_GATEWAY_LIMITS_REDIS, for them to know of"
                " each other's tokens"
            )
        return _Policy(
            rules=tuple(
                _Rule(f"{i}", rule, tuple(limits.parse(text) for text in rule.limits))
                for i, rule in enumerate(file.rules)
            ),
            issuers={
                issuer.issuer: tokens.Issuer(issuer, path.parent, once=self._limiter.once) for issuer in file.tokens
            },
            keys={bytes.fromhex(key.sha256): f"{KEY}/{key.name}" for key in file.keys},
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Inside this, the file and the keys of issuers are followed."""
        if self._path is None:
            yield
            return
        await self._look(self._path)
        task = asyncio.create_task(self._follow(self._path), name="follow access")
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await self._limiter.close()

    async def _follow(self, path: Path) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            await self._look(path)

    async def _look(self, path: Path) -> None:
        seen = signature(path)
        policy = self._policy
        if seen != self._signature:
            self._signature = seen
            try:
                policy = self._made(access_file.load(path), path)
            except ConfigError as error:
                self._wrong.set(1)
                log.error("the access file cannot be used; the old one stays", error=str(error))
            else:
                self._wrong.set(0)
                log.info("access file taken up", file=str(path))
        assert policy is not None
        # Before it is used, so that no token is refused for want of keys that are there.
        await asyncio.gather(*(issuer.refresh() for issuer in policy.issuers.values()))
        self._policy = policy

    async def guard(self, path: str, context: grpc.aio.ServicerContext) -> None:
        """Let the call in, and know from then on who makes it; raises Fault."""
        try:
            await self._admit(path, context)
        except Fault as fault:
            self._count(fault)
            raise

    async def _admit(self, path: str, context: grpc.aio.ServicerContext) -> None:
        authorization = _checked(received(context))
        policy = self._policy
        if policy is None:
            if self._certificates and (name := certificate_name(context)):
                current_caller.set(f"{CERTIFICATE}/{name}")
            return
        caller = await self._caller(policy, authorization, context)
        method = method_name(path)
        rule = _first(policy.rules, caller, method)
        if rule is None:
            if caller == ANONYMOUS:
                raise faults.unauthenticated(
                    "NO_CREDENTIALS",
                    "this gateway wants to know who calls: send metadata 'authorization: Bearer TOKEN' with a token or"
                    " an API key" + (", or connect with a certificate" if self._certificates else ""),
                )
            raise faults.permission_denied("METHOD_NOT_ALLOWED", f"{caller} may not call {method[:200]}")
        if rule.rates:
            who = _peer_host(context) if caller == ANONYMOUS else caller
            await self._limiter.hit(rule.rates, rule=rule.name, caller=who)
        current_caller.set(caller)
        _rule.set(rule)

    async def _caller(self, policy: _Policy, authorization: str | None, context: grpc.aio.ServicerContext) -> str:
        if authorization is None:
            if self._certificates and (name := certificate_name(context)):
                return f"{CERTIFICATE}/{name}"
            return ANONYMOUS
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise faults.unauthenticated("TOKEN_INVALID", "metadata.authorization: expected 'Bearer TOKEN'")
        # Compared by look-up of the hash: its time tells nothing of the keys that would fit.
        hashed = hashlib.sha256(token.encode()).digest()
        known = policy.keys.get(hashed)
        if known is not None:
            return known
        for tried in policy.issuers.values():
            known = tried.known(hashed)
            if known is not None:
                return known
        header, issuer = tokens.parts(token)
        if issuer not in policy.issuers:
            raise faults.unauthenticated("TOKEN_INVALID", "the token cannot be believed: its issuer is not known here")
        return await policy.issuers[issuer].caller(token, header)

    def _count(self, fault: Fault) -> None:
        self._refused.labels(fault.data.reason).inc()

    # --- on the call's way -----------------------------------------------------------------------------------------

    def to_service(self, metadata: Metadata) -> Metadata:
        """A call's metadata as a service gets it: who calls, and nothing of how they proved it."""
        caller = current_caller.get()
        if self._policy is None and not caller:
            return metadata
        kept = metadata
        if self._policy is not None:
            kept = tuple(pair for pair in metadata if pair[0] != AUTHORIZATION)
        return (*kept, (CALLER_KEY, caller)) if caller else kept

    def narrowed(self, tiers: tuple[tuple[P, ...], ...], name: Callable[[P], str]) -> tuple[tuple[P, ...], ...]:
        """Those pools that may serve the current call; raises Fault if there is none."""
        rule = _rule.get()
        if rule is None or not rule.rule.pools:
            return tiers
        patterns = rule.rule.pools
        left = tuple(kept for tier in tiers if (kept := tuple(p for p in tier if matches(patterns, name(p)))))
        if tiers and not left:
            shown = ", ".join(patterns)
            raise self._no(f"may be served by {shown} only, and none of these can", reason="POOL_NOT_ALLOWED")
        return left

    def check_models(self, method: Method, request: bytes) -> None:
        """Raise Fault if this request of the current call names a model that is not the caller's to use, or none."""
        rule = _rule.get()
        if rule is None or not rule.rule.models or not method.service:
            return
        patterns = rule.rule.models
        read = _READERS.get(method.path)
        if read is None:
            raise self._no(f"may use {', '.join(patterns)} only, and this method is not known here")
        if not read.field:
            return
        for field, model in read.models(request):
            if not model:
                raise self._no(f"has to name a model in {field}: one of {', '.join(patterns)}")
            if not matches(patterns, model) or ".." in model or not model.isprintable():
                raise self._no(f"may use {', '.join(patterns)} only, not {model[:80]!r} in {field}")

    def checked(self, method: Method, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The requests of a stream of the current call, each checked as by `check_models`."""
        rule = _rule.get()
        return requests if rule is None or not rule.rule.models else self._each(method, requests)

    async def _each(self, method: Method, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for request in requests:
            self.check_models(method, request)
            yield request

    def _no(self, what: str, *, reason: str = "MODEL_NOT_ALLOWED") -> Fault:
        fault = faults.permission_denied(reason, f"{current_caller.get()} {what}")
        self._count(fault)
        return fault


def caller_of(context: grpc.aio.ServicerContext) -> str:
    """Who makes the call, for whatever is counted by caller: their name, or their host while nobody is known."""
    caller = current_caller.get()
    return caller if caller and caller != ANONYMOUS else _peer_host(context)


def _peer_host(context: grpc.aio.ServicerContext) -> str:
    return _host(context.peer())


@functools.lru_cache(maxsize=1024)
def _host(peer: str) -> str:
    kind, _, rest = unquote(peer).partition(":")
    return rest.rpartition(":")[0] if kind in ("ipv4", "ipv6") else kind


def _checked(metadata: Iterable[Pair]) -> str | None:
    """The metadata `authorization`, None without; raises Fault for what would be understood in two ways."""
    seen: dict[str, str | bytes] = {}
    for key, value in metadata:
        if key.startswith(CALLER_KEY):  # -bin too
            raise faults.invalid_field(f"metadata.{key}", "only a gateway says who calls; leave it out")
        if key in _SINGLE:
            if key in seen:
                raise faults.invalid_field(f"metadata.{key}", "it is there twice; accepted: once, or not at all")
            seen[key] = value
    found = seen.get(AUTHORIZATION)
    return found.decode("ascii", "replace") if isinstance(found, bytes) else found


def _first(rules: tuple[_Rule, ...], caller: str, method: str) -> _Rule | None:
    for rule in rules:
        callers = rule.rule.callers
        # `*` is everybody who is known.
        if (ANONYMOUS in callers if caller == ANONYMOUS else matches(callers, caller)) and matches(
            rule.rule.methods, method
        ):
            return rule
    return None


class _Reader:
    """Reads every model that a request names.

    With the protobuf library and not by scanning, as routing does: what a service will see must be what is checked.
    """

    def __init__(self, method: Method) -> None:
        full, _, name = method.path[1:].rpartition("/")
        described = descriptor_pool.Default().FindMethodByName(f"{full}.{name}").input_type
        self._type: type[Message] = message_factory.GetMessageClass(described)
        fields = described.fields_by_name
        loads = name in ("LoadModel", "UnloadModel")
        self.field = "name" if loads else "model" if "model" in fields else ""

    def models(self, request: bytes) -> Iterable[tuple[str, str]]:
        try:
            message = self._type.FromString(request)
        except DecodeError:
            raise faults.invalid_field(
                "message", "it is not a valid protobuf message of this method's request"
            ) from None
        yield self.field, getattr(message, self.field)
        yield from _nested(message, "")


def _nested(message: Message, path: str) -> Iterable[tuple[str, str]]:
    for field, value in message.ListFields():
        described = field.message_type
        if described is None or described.GetOptions().map_entry:
            continue
        for part in value if field.is_repeated else (value,):
            where = f"{path}{field.name}."
            if "model" in _strings(described) and part.model:
                yield f"{where}model", part.model
            yield from _nested(part, where)


def _strings(described: Descriptor) -> set[str]:
    return {field.name for field in described.fields if field.type == FieldDescriptor.TYPE_STRING}


_READERS = {path: _Reader(method) for path, method in METHODS.items() if method.service}
