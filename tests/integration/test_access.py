"""Who a gateway lets in, and what they may do there; through real servers, with real tokens and certificates."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from prometheus_client import CollectorRegistry
from pydantic import ValidationError
from structlog.testing import capture_logs

from inkwell.diffusion.v1 import diffusion_pb2
from inkwell.ocr.v1 import ocr_pb2
from services.gateway import access_file, tokens
from services.gateway.access import Access
from services.gateway.config import ConfigError
from services.gateway.settings import Settings
from tests.support import gateway as gateways
from tests.support.backend import BIDI, DIFFUSION_STREAM, SERVER_STREAM, UNARY, Backend
from tests.support.gateway import Gateway, pool
from tests.support.tokens import AUDIENCE, ISSUER, Issuer, KeyServer

KEY = "ik_" + "x" * 40
EVERYBODY = {"callers": ["*"], "methods": ["*"]}


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


@pytest.fixture
async def backend() -> AsyncIterator[Backend]:
    started = await Backend().start()
    yield started
    await started.stop()


@pytest.fixture
def issuer() -> Issuer:
    return Issuer()


class Setup:
    """Writes the access file, and starts a gateway with it."""

    def __init__(self, folder: Path, issuer: Issuer) -> None:
        self.path = folder / "access.yaml"
        issuer.write(folder / "jwks.json")

    def write(self, *rules: dict[str, Any], keys: str = "jwks.json", **token: Any) -> None:
        corp = {"name": "corp", "issuer": ISSUER, "audience": AUDIENCE, "keys": keys, "leeway_s": 0, **token}
        known = [{"name": "scanner", "sha256": sha256(KEY)}]
        self.path.write_text(json.dumps({"rules": rules or (EVERYBODY,), "tokens": [corp], "keys": known}))

    def running(self, *backends: Backend, **settings: Any) -> contextlib.AbstractAsyncContextManager[Gateway]:
        pools = [pool(f"ocr-{i}", backend) for i, backend in enumerate(backends)]
        return gateways.running(*pools, access=str(self.path), **settings)


@pytest.fixture
def setup(tmp_path: Path, issuer: Issuer) -> Setup:
    made = Setup(tmp_path, issuer)
    made.write()
    return made


async def call(gateway: Gateway, *, request: bytes = b"", metadata: Any = (), path: str = UNARY) -> bytes:
    answer: bytes = await gateway.channel.unary_unary(path)(request, metadata=metadata, timeout=60)
    return answer


async def refused(gateway: Gateway, **options: Any) -> tuple[grpc.StatusCode, str, grpc.aio.AioRpcError]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(gateway, **options)
    return (*told(caught.value), caught.value)


def told(error: grpc.aio.AioRpcError) -> tuple[grpc.StatusCode, str]:
    """The code, and the reason in the details."""
    status = rpc_status.from_call(error)
    assert status is not None, error
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    return error.code(), info.reason


async def eventually(so: Callable[[], Awaitable[bool]]) -> None:
    """Return once it is so. For what the gateway takes up from files, which it looks at every second."""
    for _ in range(1200):
        if await so():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it did not become so within a minute")


async def until(gateway: Gateway, metadata: Any, code: grpc.StatusCode) -> None:
    """Call until it ends so."""

    async def so() -> bool:
        try:
            await call(gateway, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            return error.code() is code
        return code is grpc.StatusCode.OK

    await eventually(so)


def count(gateway: Gateway, reason: str) -> float:
    value = gateway.server.metrics.registry.get_sample_value
    return value("inkwell_gateway_refused_access_total", {"reason": reason}) or 0.0


# --- who calls --------------------------------------------------------------------------------------------------------


async def test_whoever_does_not_say_who_they_are_is_refused(setup: Setup, backend: Backend) -> None:
    async with setup.running(backend) as gateway:
        code, reason, error = await refused(gateway)
        assert (code, reason) == (grpc.StatusCode.UNAUTHENTICATED, "NO_CREDENTIALS")
        assert "authorization: Bearer TOKEN" in error.details()
        assert count(gateway, "NO_CREDENTIALS") == 1
    assert backend.call_count == 0


async def test_the_service_is_told_who_calls_and_not_how_it_was_proved(setup: Setup, backend: Backend) -> None:
    async with setup.running(backend) as gateway:
        await call(gateway, metadata=bearer(KEY))
        assert backend.metadata["inkwell-caller"] == "key/scanner"
        assert "authorization" not in backend.metadata


async def test_without_an_access_file_everything_is_as_it_was(backend: Backend) -> None:
    async with gateways.running(pool("ocr", backend)) as gateway:
        await call(gateway, metadata=bearer("of the service's own"))
        assert backend.metadata["authorization"] == "Bearer of the service's own"
        assert "inkwell-caller" not in backend.metadata


async def test_a_token_names_its_caller(setup: Setup, backend: Backend, issuer: Issuer) -> None:
    async with setup.running(backend) as gateway:
        for _ in range(3):
            await call(gateway, metadata=bearer(issuer.token()))
        assert backend.metadata["inkwell-caller"] == "corp/alice"


def _tampered(issuer: Issuer) -> str:
    header, _, signature = issuer.token().split(".")
    return ".".join((header, issuer.token(sub="root").split(".")[1], signature))


def _signed_with_the_public_key(issuer: Issuer) -> str:
    secret = issuer.keys[0].as_pem(private=False)
    header = _part({"alg": "HS256", "kid": issuer.keys[0].kid})
    claims = _part({"iss": ISSUER, "aud": AUDIENCE, "sub": "root", "exp": int(time.time()) + 60})
    return f"{header}.{claims}.{_encoded(hmac.digest(secret, f'{header}.{claims}'.encode(), 'sha256'))}"


def _unsigned(issuer: Issuer) -> str:
    return f"{_part({'alg': 'none', 'kid': issuer.keys[0].kid})}.{issuer.token(sub='root').split('.')[1]}."


def _part(content: dict[str, Any]) -> str:
    return _encoded(json.dumps(content).encode())


def _encoded(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda i: i.token(exp=int(time.time()) - 1), "TOKEN_EXPIRED"),
        (lambda i: i.token(nbf=int(time.time()) + 600), "TOKEN_INVALID"),
        (lambda i: i.token(aud="another"), "TOKEN_INVALID"),
        (lambda i: i.token(iss="https://stranger.test"), "TOKEN_INVALID"),
        (lambda i: i.token(without="exp"), "TOKEN_INVALID"),
        (lambda i: i.token(without="aud"), "TOKEN_INVALID"),
        (lambda i: i.token(sub="a\r\nb"), "TOKEN_INVALID"),
        (lambda i: i.token(sub=""), "TOKEN_INVALID"),
        (lambda i: i.token(sub=["alice"]), "TOKEN_INVALID"),
        (lambda i: i.token(exp="never"), "TOKEN_INVALID"),
        (lambda i: i.token(header={"kid": "unknown"}), "TOKEN_INVALID"),
        (lambda i: Issuer().token(header={"kid": i.keys[0].kid}), "TOKEN_INVALID"),
        (_tampered, "TOKEN_INVALID"),
        (_signed_with_the_public_key, "TOKEN_INVALID"),
        (_unsigned, "TOKEN_INVALID"),
        (lambda i: "ik_" + "y" * 40, "TOKEN_INVALID"),
        (lambda i: "..", "TOKEN_INVALID"),
        (lambda i: "W10.W10.W10", "TOKEN_INVALID"),  # lists
        (lambda i: "x" * 9000, "TOKEN_INVALID"),
    ],
)
async def test_a_wrong_token_is_refused_counted_and_never_shown(
    setup: Setup, backend: Backend, issuer: Issuer, make: Any, reason: str
) -> None:
    setup.write({"callers": ["*", "anonymous"], "methods": ["*"]})  # a wrong token is worse than none
    token = make(issuer)
    async with setup.running(backend) as gateway:
        with capture_logs() as logged:
            code, said, error = await refused(gateway, metadata=bearer(token))
            await gateway.idle()
        assert (code, said) == (grpc.StatusCode.UNAUTHENTICATED, reason)
        assert count(gateway, reason) == 1
        shown = repr(logged) + error.details() + repr(error.trailing_metadata())
        assert token not in shown
        assert len(token) < 10 or token.split(".")[-1][:20] not in shown or token.endswith(".")
        await call(gateway, metadata=bearer(issuer.token()))
    assert backend.call_count == 1


async def test_another_scheme_than_bearer_is_refused(setup: Setup, backend: Backend) -> None:
    async with setup.running(backend) as gateway:
        code, reason, _ = await refused(gateway, metadata=(("authorization", "Basic YTpi"),))
        assert (code, reason) == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID")


async def test_a_token_that_is_good_once(setup: Setup, backend: Backend, issuer: Issuer) -> None:
    setup.write(once=True)
    async with setup.running(backend) as gateway:
        token = bearer(issuer.token(jti="1"))
        await call(gateway, metadata=token)
        assert (await refused(gateway, metadata=token))[1] == "TOKEN_REPLAYED"
        # Another token with the same id is the same token to whoever replays.
        assert (await refused(gateway, metadata=bearer(issuer.token(jti="1"))))[1] == "TOKEN_REPLAYED"
        await call(gateway, metadata=bearer(issuer.token(jti="2")))
        assert (await refused(gateway, metadata=bearer(issuer.token())))[1] == "TOKEN_INVALID"
    assert backend.call_count == 2


async def test_withdrawn_keys_in_a_file(setup: Setup, backend: Backend, issuer: Issuer, tmp_path: Path) -> None:
    async with setup.running(backend) as gateway:
        old = bearer(issuer.token())
        await call(gateway, metadata=old)
        issuer.rotate()
        issuer.write(tmp_path / "jwks.json")
        await until(gateway, bearer(issuer.token()), grpc.StatusCode.OK)
        assert (await refused(gateway, metadata=old))[1] == "TOKEN_INVALID"


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"keys": []}', '{"keys": [{"kty": "oct", "k": "AAECAwQFBgcICQoLDA0ODxAREhM"}]}', None]
)
async def test_keys_that_cannot_be_used_change_nothing(issuer: Issuer, tmp_path: Path, content: str | None) -> None:
    async def once(_key: str, _seconds: float) -> bool:
        return True

    path = issuer.write(tmp_path / "jwks.json")
    config = access_file.TokenIssuer(name="corp", issuer=ISSUER, audience=AUDIENCE, keys="jwks.json")
    known = tokens.Issuer(config, tmp_path, once=once)
    await known.refresh()
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with capture_logs() as logged:
        await known.refresh()
        await known.refresh()
    assert [entry["log_level"] for entry in logged] == ["error"]
    token = issuer.token()
    assert await known.caller(token, tokens.parts(token)[0]) == "corp/alice"


async def test_keys_behind_a_url_are_kept_and_rotated(setup: Setup, backend: Backend, issuer: Issuer) -> None:
    with KeyServer(issuer).running() as server:
        setup.write(keys=server.url)
        async with setup.running(backend) as gateway:
            for _ in range(5):
                await call(gateway, metadata=bearer(issuer.token()))
            assert server.asked == 1
            # Nobody can make the gateway ask its issuer again and again.
            for _ in range(5):
                await refused(gateway, metadata=bearer(issuer.token(header={"kid": "made up"})))
            assert server.asked == 1


async def test_a_new_key_is_asked_for_when_it_is_first_used(
    setup: Setup, backend: Backend, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.tokens._ASK_AGAIN_S", 0.0)
    with KeyServer(issuer).running() as server:
        setup.write(keys=server.url)
        async with setup.running(backend) as gateway:
            issuer.rotate(keep=True)
            await call(gateway, metadata=bearer(issuer.token()))
            assert server.asked == 2


async def test_an_issuer_that_is_away_refuses_nobody_for_good(
    setup: Setup, backend: Backend, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.tokens._ASK_AGAIN_S", 0.0)
    with KeyServer(issuer).running() as server:
        port = int(server.url.split(":")[2].split("/")[0])
    setup.write(keys=server.url)
    async with setup.running(backend) as gateway:
        code, reason, _ = await refused(gateway, metadata=bearer(issuer.token()))
        assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "TOKEN_KEYS_UNAVAILABLE")
        await call(gateway, metadata=bearer(KEY))
        with KeyServer(issuer, port).running():
            await call(gateway, metadata=bearer(issuer.token()))
        await call(gateway, metadata=bearer(issuer.token(sub="bob")))


# --- what they may do -------------------------------------------------------------------------------------------------


async def test_the_first_rule_that_fits_decides(setup: Setup, backend: Backend, issuer: Issuer) -> None:
    setup.write(
        {"callers": ["key/scanner"], "methods": ["ocr/Recognize"]},
        {"callers": ["corp/*"], "methods": ["ocr/*"]},
    )
    async with setup.running(backend) as gateway:
        await call(gateway, metadata=bearer(KEY))
        stream = gateway.channel.unary_stream(SERVER_STREAM)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream(b"", metadata=bearer(KEY)).read()
        assert told(caught.value) == (grpc.StatusCode.PERMISSION_DENIED, "METHOD_NOT_ALLOWED")
        assert "key/scanner may not call ocr/StreamRecognize" in caught.value.details()
        assert await stream(b"x", metadata=bearer(issuer.token())).read() == b"x"


async def test_the_gateways_own_services_are_covered_too(setup: Setup, backend: Backend) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    setup.write({"callers": ["key/scanner"], "methods": ["ocr/*", "reflection/*"]})
    async with setup.running(backend) as gateway:
        health = await health_pb2_grpc.HealthStub(gateway.channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING

        pools = "/inkwell.gateway.v1.GatewayService/ListPools"
        assert (await refused(gateway, path=pools, metadata=bearer(KEY)))[1] == "METHOD_NOT_ALLOWED"
        channelz = "/grpc.channelz.v1.Channelz/GetServers"
        assert (await refused(gateway, path=channelz, metadata=bearer(KEY)))[1] == "METHOD_NOT_ALLOWED"

        ask = reflection_pb2_grpc.ServerReflectionStub(gateway.channel).ServerReflectionInfo
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(iter([question])).read()
        assert told(caught.value)[1] == "NO_CREDENTIALS"
        assert (await ask(iter([question]), metadata=bearer(KEY)).read()).list_services_response.service


async def test_anonymous_callers_if_a_rule_names_them(setup: Setup, backend: Backend) -> None:
    setup.write({"callers": ["anonymous"], "methods": ["ocr/Recognize"]}, EVERYBODY)
    async with setup.running(backend) as gateway:
        await call(gateway)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway.channel.unary_stream(SERVER_STREAM)(b"").read()
        assert told(caught.value) == (grpc.StatusCode.UNAUTHENTICATED, "NO_CREDENTIALS")


ONE_MODEL = {"callers": ["*"], "methods": ["*"], "models": ["handwriting-*"]}


async def test_models_of_unary_calls(setup: Setup, backend: Backend) -> None:
    setup.write(ONE_MODEL)
    async with setup.running(backend) as gateway:
        for model, allowed in [
            ("handwriting-tiny", True),
            ("trocr-large", False),
            ("", False),
            ("handwriting-../../etc/passwd", False),
            ("x/handwriting-tiny", False),
        ]:
            request = ocr_pb2.RecognizeRequest(model=model).SerializeToString()
            if allowed:
                await call(gateway, request=request, metadata=bearer(KEY))
            else:
                code, reason, error = await refused(gateway, request=request, metadata=bearer(KEY))
                assert (code, reason) == (grpc.StatusCode.PERMISSION_DENIED, "MODEL_NOT_ALLOWED")
                assert "handwriting-*" in error.details()
    assert backend.call_count == 1


async def test_a_model_cannot_hide_behind_an_unknown_group(setup: Setup, backend: Backend) -> None:
    setup.write(ONE_MODEL)
    allowed = ocr_pb2.RecognizeRequest(model="handwriting-tiny").SerializeToString()
    hidden = ocr_pb2.RecognizeRequest(model="trocr-large").SerializeToString()
    group = b"\xa3\x06\xa4\x06"  # field 100 as a group: its start and its end
    request = allowed + group + hidden
    assert ocr_pb2.RecognizeRequest.FromString(request).model == "trocr-large"
    async with setup.running(backend) as gateway:
        assert (await refused(gateway, request=request, metadata=bearer(KEY)))[1] == "MODEL_NOT_ALLOWED"


async def test_models_of_every_request_of_a_stream(setup: Setup, backend: Backend) -> None:
    setup.write(ONE_MODEL)

    def request(model: str) -> bytes:
        return ocr_pb2.BatchRecognizeRequest(id="1", model=model).SerializeToString()

    async with setup.running(backend) as gateway:
        stream = gateway.channel.stream_stream(BIDI)(metadata=bearer(KEY), timeout=60)
        await stream.write(request("handwriting-tiny"))
        assert await stream.read() == request("handwriting-tiny")
        await stream.write(request("trocr-large"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert told(caught.value) == (grpc.StatusCode.PERMISSION_DENIED, "MODEL_NOT_ALLOWED")


async def test_models_inside_of_other_parts_of_a_request(setup: Setup, backend: Backend) -> None:
    setup.write({"callers": ["*"], "methods": ["*"], "models": ["emoji-tiny"]})
    request = diffusion_pb2.GenerateRequest(model="emoji-tiny")
    request.refiner.model = "sdxl-refiner"
    async with gateways.running(pool("diffusion", backend, service="diffusion"), access=str(setup.path)) as gateway:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway.channel.unary_stream(DIFFUSION_STREAM)(
                request.SerializeToString(), metadata=bearer(KEY)
            ).read()
        assert told(caught.value)[1] == "MODEL_NOT_ALLOWED"
        assert "refiner.model" in caught.value.details()


async def test_pools(setup: Setup, backend: Backend, issuer: Issuer) -> None:
    other = await Backend().start()
    setup.write(
        {"callers": ["key/*"], "methods": ["*"], "pools": ["ocr-1"]},
        {"callers": ["corp/*"], "methods": ["*"], "pools": ["gone"]},
    )
    async with setup.running(backend, other) as gateway:
        for _ in range(4):
            await call(gateway, metadata=bearer(KEY))
        assert (backend.call_count, other.call_count) == (0, 4)
        code, reason, error = await refused(gateway, metadata=bearer(issuer.token()))
        assert (code, reason) == (grpc.StatusCode.PERMISSION_DENIED, "POOL_NOT_ALLOWED")
        # Nor by way of a retry.
        await other.stop()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway.channel.unary_unary(UNARY)(b"", metadata=bearer(KEY), timeout=0.5)
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    assert backend.call_count == 0


# --- metadata that would be understood in two ways --------------------------------------------------------------------


@pytest.mark.parametrize(
    "metadata",
    [
        (("inkwell-caller", "corp/root"),),
        (*bearer(KEY), *bearer(KEY)),
        (*bearer(KEY), ("authorization", "Bearer other")),
        (("inkwell-priority", "low"), ("inkwell-priority", "high")),
        (("x-request-id", "a"), ("x-request-id", "b")),
    ],
)
@pytest.mark.parametrize("with_file", [True, False])
async def test_smuggled_metadata_is_refused(setup: Setup, backend: Backend, metadata: Any, with_file: bool) -> None:
    async with gateways.running(pool("ocr", backend), access=str(setup.path) if with_file else "") as gateway:
        code, reason, error = await refused(gateway, metadata=metadata)
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
        assert f"metadata.{metadata[-1][0]}" in error.details()
        assert KEY not in error.details()
    assert backend.call_count == 0


# --- the file ---------------------------------------------------------------------------------------------------------


async def test_the_file_is_taken_up_without_a_restart(setup: Setup, backend: Backend) -> None:
    async with setup.running(backend) as gateway:
        await call(gateway, metadata=bearer(KEY))
        setup.write({"callers": ["corp/*"], "methods": ["*"]})
        await until(gateway, bearer(KEY), grpc.StatusCode.PERMISSION_DENIED)

        setup.path.write_text("rules: nonsense")
        wrong = gateway.server.metrics.registry.get_sample_value

        async def reported() -> bool:
            return wrong("inkwell_gateway_access_file_wrong") == 1

        await eventually(reported)
        assert (await refused(gateway, metadata=bearer(KEY)))[0] is grpc.StatusCode.PERMISSION_DENIED
        setup.write()
        await until(gateway, bearer(KEY), grpc.StatusCode.OK)
        assert wrong("inkwell_gateway_access_file_wrong") == 0


async def test_a_call_goes_on_by_the_rules_it_began_with(setup: Setup) -> None:
    release = asyncio.Event()

    async def hold(requests: AsyncIterator[bytes], _context: Any) -> AsyncGenerator[bytes, None]:
        async for request in requests:
            if request == b"hold":
                await release.wait()
            yield request

    holding = await Backend(hold).start()
    async with setup.running(holding) as gateway:
        began = asyncio.create_task(call(gateway, request=b"hold", metadata=bearer(KEY)))
        await holding.entered.wait()
        setup.write({"callers": ["corp/*"], "methods": ["*"]})
        await until(gateway, bearer(KEY), grpc.StatusCode.PERMISSION_DENIED)
        release.set()
        await began
    await holding.stop()


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ({}, "rules: this key is required"),
        ({"rules": [{"callers": ["*"], "methods": ["ocr/Recognise"]}]}, "'ocr/Recognise' is no method; accepted"),
        ({"rules": [{"callers": ["key/nobody"], "methods": ["*"]}]}, "'key/nobody' is nobody; accepted"),
        ({"rules": [EVERYBODY | {"limits": ["often"]}]}, "'often' is not a limit; accepted: as in '10/second'"),
        ({"rules": [EVERYBODY | {"model": "a"}]}, "rules[0].model: there is no such key"),
        ({"rules": [EVERYBODY], "keys": [{"name": "a", "sha256": KEY}]}, "keys[0].sha256"),
        (
            {"rules": [EVERYBODY], "keys": [{"name": n, "sha256": sha256(KEY)} for n in ("a", "b")]},
            "is given twice",
        ),
        (
            {"rules": [EVERYBODY], "tokens": [{"name": "a", "issuer": "i", "audience": "a", "keys": "http://a.test"}]},
            "would fetch keys in plain text",
        ),
        (
            {
                "rules": [EVERYBODY],
                "tokens": [{"name": "a", "issuer": "i", "audience": "a", "keys": "k", "algorithms": ["HS256"]}],
            },
            "tokens[0].algorithms[0]",
        ),
        (
            {"rules": [EVERYBODY], "tokens": [{"name": "key", "issuer": "i", "audience": "a", "keys": "k"}]},
            "is the name of another kind of caller",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(tmp_path: Path, file: dict[str, Any], said: str) -> None:
    path = tmp_path / "access.yaml"
    path.write_text(json.dumps(file))
    with pytest.raises(ConfigError) as caught:
        access_file.load(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


# --- how often --------------------------------------------------------------------------------------------------------


async def test_a_rate_limit_is_each_callers_own(setup: Setup, backend: Backend, issuer: Issuer) -> None:
    setup.write(EVERYBODY | {"limits": ["3/hour", "1000/day"]})
    async with setup.running(backend) as gateway:
        for _ in range(3):
            await call(gateway, metadata=bearer(KEY))
        code, reason, error = await refused(gateway, metadata=bearer(KEY))
        assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED")
        assert "key/scanner may call 3 times in 3600 seconds" in error.details()
        assert 0 < int(dict(error.trailing_metadata() or ())["grpc-retry-pushback-ms"]) <= 3_600_000
        await call(gateway, metadata=bearer(issuer.token()))
        assert count(gateway, "RATE_LIMITED") == 1
    assert backend.call_count == 4


# --- settings ---------------------------------------------------------------------------------------------------------


def test_a_gateway_on_another_address_than_loopback_needs_a_decision(setup: Setup) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(host="0.0.0.0", tls="off")
    (wrong,) = caught.value.errors()
    assert wrong["loc"] == ("access",)
    assert "INKWELL_GATEWAY_ACCESS=off" in wrong["msg"]
    Settings(host="0.0.0.0", tls="off", access="off")
    Settings(host="0.0.0.0", tls="off", access=str(setup.path))


def test_a_redis_address_that_is_none_is_not_shown(setup: Setup) -> None:
    settings = Settings(limits_redis="mysql://:pass-word@host/0", access=str(setup.path))
    with pytest.raises(ConfigError, match=r"INKWELL_GATEWAY_LIMITS_REDIS: expected redis://HOST") as caught:
        Access(settings, CollectorRegistry())
    assert "pass-word" not in str(caught.value) + repr(settings)


def test_tokens_good_once_take_a_store_if_there_are_several_processes(setup: Setup) -> None:
    setup.write(once=True)
    with pytest.raises(ConfigError, match=r"takes INKWELL_GATEWAY_LIMITS_REDIS"):
        Access(Settings(processes=2, access=str(setup.path)), CollectorRegistry())
