"""An authority of a test's own, and folders of certificates as servers and callers want them."""

import datetime
import os
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_DAY = datetime.timedelta(days=1)


class Authority:
    """Signs certificates. Elliptic keys, because those of RSA take long to make."""

    def __init__(self, name: str = "test authority") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = _builder(self._name, self._name, self._key.public_key(), _DAY)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self.pem = builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def folder(self, path: Path, name: str, *, hosts: tuple[str, ...] = (), valid: datetime.timedelta = _DAY) -> Path:
        """Write `path`, or write it anew: a certificate for `name` and the other names, its key, and this authority.

        A negative `valid` makes one that has expired.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = _builder(subject, self._name, key.public_key(), valid).add_extension(
            x509.SubjectAlternativeName([x509.DNSName(host) for host in (name, *hosts)]), critical=False
        )
        certificate = builder.sign(self._key, hashes.SHA256())
        path.mkdir(exist_ok=True)
        files = {
            "tls.crt": certificate.public_bytes(serialization.Encoding.PEM),
            "tls.key": key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
            "ca.crt": self.pem,
        }
        for file, content in files.items():
            (path / f".{file}").write_bytes(content)
            os.replace(path / f".{file}", path / file)
        return path


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, valid: datetime.timedelta
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    end = now + valid
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - _DAY)
        .not_valid_after(end)
    )


def credentials(folder: Path, *, certificate: bool = True) -> grpc.ChannelCredentials:
    """A caller that trusts the folder's authority, with the folder's certificate or without one."""
    ca = (folder / "ca.crt").read_bytes()
    if not certificate:
        return grpc.ssl_channel_credentials(ca)
    return grpc.ssl_channel_credentials(ca, (folder / "tls.key").read_bytes(), (folder / "tls.crt").read_bytes())
