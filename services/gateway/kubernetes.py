"""The endpoints of a Kubernetes Service, followed through its EndpointSlices.

One list and one watch of the API server for each target, over HTTPS with the token of the pod's service account, which
may `list` and `watch` `endpointslices` of `discovery.k8s.io`. Nothing else of Kubernetes is used, so this is plain
HTTP: a client library would bring in far more than it saves.
"""

import asyncio
import json
import os
import random
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import structlog

from services.gateway.config import Target, join_address

log = structlog.get_logger(__name__)

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")  # where Kubernetes puts a pod's token and CA
_SERVICE_LABEL = "kubernetes.io/service-name"
# The API server ends a watch after this long, and it is begun anew: a connection that is silently dead is noticed.
_WATCH_S = 60
_SILENCE_S = 15.0
_CONNECT_S = 5.0
_RETRY_FIRST_S = 0.2
_RETRY_MOST_S = 5.0
# An event holds one slice, which has at most 1000 endpoints.
_LINE_BYTES_MOST = 8 << 20


@dataclass(frozen=True, slots=True)
class ApiServer:
    """Where the API server is, and the folder of what to show it.

    account: `token` in it is read for each request, for Kubernetes replaces it; `ca.crt`, if it is there, says who
    signs the server's certificate, else the system's authorities do.
    """

    url: str
    account: Path = ACCOUNT


def api_server(url: str, account: Path) -> ApiServer | None:
    """The one at `url`, or if that is empty, of the cluster that this process runs in; None outside of Kubernetes."""
    if not url:
        host = os.environ.get("KUBERNETES_SERVICE_HOST")
        if not host:
            return None
        url = f"https://{join_address(host, int(os.environ.get('KUBERNETES_SERVICE_PORT', '443')))}"
    return ApiServer(url, account)


class KubernetesError(Exception):
    """The API server cannot be asked, or its answer cannot be used."""


class Slices:
    """What is known of one Service's slices. port: a number, or the name of a port of the Service."""

    def __init__(self, port: str) -> None:
        self._port = port
        self._addresses: dict[str, list[str]] = {}  # by slice

    def replace(self, slices: list[Any]) -> None:
        """Forget all that is known; these are the slices now."""
        self._addresses = {}
        for item in slices:
            self.put(item)

    def put(self, item: Any) -> None:
        """A slice is new, or has changed. Raises KubernetesError for what is no slice."""
        try:
            self._addresses[item["metadata"]["name"]] = list(self._read(item))
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise KubernetesError(f"not an EndpointSlice: {type(error).__name__}: {error}") from None

    def remove(self, item: Any) -> None:
        """A slice is gone."""
        self._addresses.pop(item["metadata"]["name"], None)

    def addresses(self) -> list[str]:
        """host:port of every endpoint that Kubernetes calls ready, each once: slices may overlap while they change."""
        return sorted({address for found in self._addresses.values() for address in found})

    def _read(self, item: Any) -> list[str]:
        if self._port.isdecimal():
            port = int(self._port)
        else:
            numbers = [p["port"] for p in item.get("ports") or () if p.get("name") == self._port]
            if not numbers:
                return []
            port = int(numbers[0])
        found = []
        for endpoint in item.get("endpoints") or ():
            # Absent means ready. One that terminates is not, and so is drained.
            if (endpoint.get("conditions") or {}).get("ready") is not False:
                # They stand for one and the same endpoint.
                found.append(join_address(str(endpoint["addresses"][0]), port))
        return found


class SliceWatch:
    """Follows the slices of one target. found: called with the addresses whenever they may have changed.

    An API server that is away changes nothing.
    """

    def __init__(self, target: Target, server: ApiServer, *, found: Callable[[list[str]], None]) -> None:
        self._target = target
        self._server = server
        self._found = found
        self._slices = Slices(target.port_name or str(target.port))
        self._listed = asyncio.Event()

    async def listed(self) -> None:
        """Return when the addresses were found for the first time."""
        await self._listed.wait()

    async def run(self) -> None:
        """Follow until cancelled."""
        delay_s = _RETRY_FIRST_S
        client: httpx2.AsyncClient | None = None
        try:
            while True:
                try:
                    client = client or self._client()
                    version = await self._list(client)
                    while True:
                        version = await self._watch(client, version)
                        delay_s = _RETRY_FIRST_S
                        await asyncio.sleep(delay_s)
                except _Expired:
                    # The server no longer knows what came after our version: list again.
                    await asyncio.sleep(_RETRY_FIRST_S)
                except Exception as error:
                    # Whatever it was, the pool must not stay as it is for ever.
                    known = isinstance(error, KubernetesError | httpx2.HTTPError | OSError)
                    log.warning(
                        "cannot follow endpoint slices",
                        target=self._target.text,
                        error=str(error) or type(error).__name__,
                        retry_in_s=round(delay_s, 1),
                        exc_info=not known,
                    )
                    if client is not None:
                        await client.aclose()
                        client = None  # the authority's certificate may have been replaced
                    # Spread, so that gateways do not come back all at once.
                    await asyncio.sleep(delay_s * random.uniform(0.8, 1.2))
                    delay_s = min(delay_s * 2, _RETRY_MOST_S)
        finally:
            if client is not None:
                await client.aclose()

    def _client(self) -> httpx2.AsyncClient:
        authority = self._server.account / "ca.crt"
        try:
            context = ssl.create_default_context(cafile=authority if authority.exists() else None)
        except OSError as error:
            raise KubernetesError(f"{authority}: {error}") from None
        return httpx2.AsyncClient(
            base_url=self._server.url,
            verify=context,
            timeout=httpx2.Timeout(_CONNECT_S, read=_WATCH_S + _SILENCE_S),
            trust_env=False,  # the API server is part of our own cluster, never behind the proxy of the environment
        )

    def _request(self, client: httpx2.AsyncClient, timeout_s: float, **parameters: str) -> httpx2.Request:
        namespace, service = self._target.namespace, self._target.host
        try:
            token = (self._server.account / "token").read_text("ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise KubernetesError(f"the token of the service account: {error}") from None
        headers = {"accept": "application/json", "authorization": f"Bearer {token}"}
        return client.build_request(
            "GET",
            f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices",
            params={"labelSelector": f"{_SERVICE_LABEL}={service}", **parameters},
            headers=headers,
            timeout=httpx2.Timeout(_CONNECT_S, read=timeout_s),
        )

    async def _list(self, client: httpx2.AsyncClient) -> str:
        response = await client.send(self._request(client, _CONNECT_S))
        _check(response)
        try:
            answer = response.json()
            version, items = str(answer["metadata"]["resourceVersion"]), list(answer.get("items") or ())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise KubernetesError("the answer to a list is no EndpointSliceList") from None
        self._slices.replace(items)
        self._tell()
        return version

    async def _watch(self, client: httpx2.AsyncClient, version: str) -> str:
        """Take in events until the server ends the watch; answers the version to go on from."""
        request = self._request(
            client,
            _WATCH_S + _SILENCE_S,
            watch="1",
            resourceVersion=version,
            allowWatchBookmarks="true",
            timeoutSeconds=str(_WATCH_S),
        )
        response = await client.send(request, stream=True)
        try:
            if response.is_error:
                await response.aread()
            _check(response)
            async for event in _events(response):
                item = event["object"]
                match event["type"]:
                    case "ADDED" | "MODIFIED":
                        self._slices.put(item)
                    case "DELETED":
                        self._slices.remove(item)
                    case "BOOKMARK":
                        pass
                    case "ERROR":
                        if item.get("code") == 410:
                            raise _Expired
                        raise KubernetesError(f"the watch failed: {str(item.get('message'))[:200]}")
                    case other:
                        raise KubernetesError(f"{str(other)[:40]!r} is not a type of watch event")
                version = str(item["metadata"]["resourceVersion"])
                if event["type"] != "BOOKMARK":
                    self._tell()
        except (KeyError, TypeError, AttributeError) as error:
            raise KubernetesError(f"not a watch event: {type(error).__name__}: {error}") from None
        finally:
            await response.aclose()
        return version

    def _tell(self) -> None:
        self._found(self._slices.addresses())
        self._listed.set()


class _Expired(Exception):
    """The resource version is too old to watch from."""


def _check(response: httpx2.Response) -> None:
    if response.status_code == 410:
        raise _Expired
    if response.status_code in (401, 403):
        raise KubernetesError(
            f"the API server answers {response.status_code}: may this pod's service account list and watch"
            " endpointslices of discovery.k8s.io?"
        )
    if response.status_code != 200:
        raise KubernetesError(f"the API server answers {response.status_code}")


async def _events(response: httpx2.Response) -> AsyncIterator[Any]:
    """The JSON objects of a watch, one a line."""
    begun = bytearray()
    async for data in response.aiter_bytes():
        *lines, rest = data.split(b"\n")
        for line in lines:
            begun += line
            if begun.strip():
                try:
                    yield json.loads(begun)
                except ValueError:
                    raise KubernetesError("a watch event is not JSON") from None
            begun.clear()
        begun += rest
        if len(begun) > _LINE_BYTES_MOST:
            raise KubernetesError(f"a watch event is larger than {_LINE_BYTES_MOST} bytes")
