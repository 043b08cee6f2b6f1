"""TLS of servers and of channels, from one folder of PEM files that is read anew when it changes.

The folder is what Kubernetes mounts for a `kubernetes.io/tls` secret, and what cert-manager fills:

- `tls.crt`  the certificate of this process, followed by its intermediates,
- `tls.key`  its private key, unencrypted,
- `ca.crt`   who signs the certificates of the other side: of callers, and of the servers that are called.
"""

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from services.kit.settings import AUTHORITY, CERTIFICATE, KEY

log = structlog.get_logger(__name__)

# How often channels look for renewed files. Servers look at every handshake.
_LOOK_S = 2.0

Signature = tuple[tuple[int, int, int], ...]


class TlsError(OSError):
    """The files cannot be used; the message names the file and what it should hold."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """The content of the folder, checked."""

    certificate: bytes
    key: bytes
    authority: bytes | None
    expires: datetime


def signature(*paths: Path) -> Signature:
    """What changes when one of the files does; a missing one counts as a state like any other."""
    found = []
    for path in paths:
        try:
            stat = os.stat(path)
            found.append((stat.st_mtime_ns, stat.st_size, stat.st_ino))
        except OSError:
            found.append((0, -1, 0))
    return tuple(found)


def read(folder: Path) -> Bundle:
    """Read and check the folder; raises TlsError."""
    certificate, key = _content(folder / CERTIFICATE), _content(folder / KEY)
    authority = _content(folder / AUTHORITY) if (folder / AUTHORITY).exists() else None
    chain = _certificates(folder / CERTIFICATE, certificate)
    if authority is not None:
        _certificates(folder / AUTHORITY, authority)
    try:
        private = load_pem_private_key(key, password=None)
    except (ValueError, TypeError):
        # The reason is left out: it may quote the file.
        raise TlsError(f"{folder / KEY}: expected one unencrypted private key in PEM") from None
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if private.public_key().public_bytes(*form) != chain[0].public_key().public_bytes(*form):
        raise TlsError(f"{folder / KEY} is not the key of the first certificate in {folder / CERTIFICATE}")
    return Bundle(certificate, key, authority, chain[0].not_valid_after_utc)


class TlsFolder:
    """A folder of PEM files and the credentials made of it. Raises TlsError if it cannot be used from the start.

    Files that are wrong later, or half written, are reported once and change nothing: what was read last stays.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths = (folder / CERTIFICATE, folder / KEY, folder / AUTHORITY)
        self._lock = threading.Lock()  # gRPC asks from threads of its own
        self._signature = signature(*self._paths)
        self._bundle = read(folder)
        _warn_if_expired(folder, self._bundle)

    @property
    def has_authority(self) -> bool:
        """Whether there is a ca.crt."""
        return self._bundle.authority is not None

    def current(self) -> Bundle:
        """The latest content that can be used. Cheap while nothing changes: three `stat` calls."""
        with self._lock:
            seen = signature(*self._paths)
            if seen != self._signature:
                try:
                    self._bundle = read(self.folder)
                except TlsError as error:
                    log.error("renewed certificates cannot be used; the old ones stay", error=str(error))
                else:
                    log.info("certificates renewed", folder=str(self.folder), expires=self._bundle.expires.isoformat())
                    _warn_if_expired(self.folder, self._bundle)
                self._signature = seen
            return self._bundle

    def server_credentials(self, *, require_clients: bool) -> Any:
        """`grpc.ServerCredentials` that serve whatever the folder holds when a connection begins.

        require_clients: only callers with a certificate that ca.crt signed get through the handshake.
        """
        served = self.current()

        def renewed() -> Any:
            nonlocal served
            latest = self.current()
            if latest is served:
                return None
            served = latest
            return _configuration(latest, require_clients)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(served, require_clients), renewed, require_client_authentication=require_clients
        )

    def channel_credentials(self) -> Any:
        """`grpc.ChannelCredentials` of what the folder holds now, which stay so: a channel cannot change them.

        Without ca.crt the roots that gRPC ships vouch for servers.
        """
        bundle = self.current()
        return grpc.ssl_channel_credentials(bundle.authority, bundle.key, bundle.certificate)

    @contextlib.asynccontextmanager
    async def followed(self, on_change: Callable[[], None]) -> AsyncIterator[None]:
        """Inside this, `on_change` is called within two seconds of a change, so that channels can be opened anew."""
        known = self.current()

        async def follow() -> None:
            nonlocal known
            while True:
                await asyncio.sleep(_LOOK_S)
                latest = self.current()
                if latest is not known:
                    known = latest
                    on_change()

        task = asyncio.create_task(follow(), name=f"follow {self.folder}")
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def _configuration(bundle: Bundle, require_clients: bool) -> Any:
    roots = bundle.authority if require_clients else None
    return grpc.ssl_server_certificate_configuration([(bundle.key, bundle.certificate)], roots)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TlsError(f"{path}: cannot be read: {error.strerror}") from None


def _certificates(path: Path, content: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError:
        raise TlsError(f"{path}: expected certificates in PEM") from None


def _warn_if_expired(folder: Path, bundle: Bundle) -> None:
    if bundle.expires <= datetime.now(UTC):
        # Served all the same: callers refuse it and say why, and a renewed one is taken up without a restart.
        log.error("the certificate has expired", folder=str(folder), expired=bundle.expires.isoformat())
