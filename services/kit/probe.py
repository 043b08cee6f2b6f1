"""`python -m services.kit.probe SERVICE [NAME]`: asks a server on this machine how it is, for probes that speak no TLS.

Reads the same environment as the service does, and calls it with its own certificate. Ends with 0 if it is SERVING,
with 1 if it is not or does not answer, with 2 if it cannot be asked.
"""

import argparse
import sys
from typing import Any

import grpc
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import ValidationError

from services.kit.server import READINESS
from services.kit.settings import ServiceSettings
from services.kit.tls import TlsError, TlsFolder

_PORTS = {"gateway": 50050, "ocr": 50051, "diffusion": 50052, "compiler": 50053}
_WITHIN_S = 5.0


def ask(settings: ServiceSettings, port: int, name: str) -> str:
    """What the server on this machine says of `name`, such as "SERVING". Raises grpc.RpcError and TlsError."""
    host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(settings.host, settings.host)
    with _channel(settings, f"{host}:{port}") as channel:
        request = health_pb2.HealthCheckRequest(service=name)
        answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=_WITHIN_S)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def _channel(settings: ServiceSettings, target: str) -> Any:
    if settings.tls_folder is None:
        return grpc.insecure_channel(target)
    folder = TlsFolder(settings.tls_folder)
    # It is on this machine, whatever name its certificate has.
    options = [("grpc.ssl_target_name_override", _name(folder.current().certificate))]
    return grpc.secure_channel(target, folder.channel_credentials(), options=options)


def _name(certificate: bytes) -> str:
    found = x509.load_pem_x509_certificate(certificate)
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return str((names.get_values_for_type(x509.DNSName) or names.get_values_for_type(x509.IPAddress))[0])


def main() -> None:
    """Ask, and end with the answer."""
    parser = argparse.ArgumentParser(prog="python -m services.kit.probe", description=__doc__)
    parser.add_argument("service", choices=sorted(_PORTS))
    parser.add_argument("name", nargs="?", default=READINESS, help="readiness, liveness, or a full service name")
    arguments = parser.parse_args()
    prefix = f"INKWELL_{arguments.service.upper()}_"

    class Settings(ServiceSettings, env_prefix=prefix, extra="ignore"):
        port: int = _PORTS[arguments.service]

    try:
        settings = Settings()
        said = ask(settings, settings.port, arguments.name)
    except (ValidationError, TlsError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except grpc.RpcError as error:
        print(f"{error.code().name}: {error.details()}", file=sys.stderr)
        raise SystemExit(1) from None
    print(said)
    raise SystemExit(0 if said == "SERVING" else 1)


if __name__ == "__main__":
    main()
