"""Which gRPC services the gateway routes, and the shape of their methods.

The one table that ties the names used in the configuration to protobuf services. Another service needs a line in
`_SERVICES` and nothing else.
"""

from dataclasses import dataclass

from google.protobuf.descriptor import ServiceDescriptor

from inkwell.diffusion.v1 import diffusion_pb2
from inkwell.ocr.v1 import ocr_pb2

_SERVICES: dict[str, ServiceDescriptor] = {
    "ocr": ocr_pb2.DESCRIPTOR.services_by_name["OcrService"],
    "diffusion": diffusion_pb2.DESCRIPTOR.services_by_name["DiffusionService"],
}

# Configuration name -> full protobuf name, such as "ocr" -> "inkwell.ocr.v1.OcrService".
FULL_NAMES: dict[str, str] = {name: descriptor.full_name for name, descriptor in _SERVICES.items()}
_NAMES: dict[str, str] = {full: name for name, full in FULL_NAMES.items()}


@dataclass(frozen=True, slots=True)
class Method:
    """One routed method."""

    path: str  # as on the wire: "/inkwell.ocr.v1.OcrService/Recognize"
    label: str  # for metrics: "inkwell.ocr.v1.OcrService/Recognize", or ".../other" for methods not in the table
    service: str  # configuration name: "ocr"
    request_streaming: bool
    response_streaming: bool
    known: bool = True  # False for a path that the protos of this build do not have, so the caller may have made it up


METHODS: dict[str, Method] = {
    f"/{descriptor.full_name}/{method.name}": Method(
        path=f"/{descriptor.full_name}/{method.name}",
        label=f"{descriptor.full_name}/{method.name}",
        service=name,
        request_streaming=method.client_streaming,
        response_streaming=method.server_streaming,
    )
    for name, descriptor in _SERVICES.items()
    for method in descriptor.methods
}


def find(path: str) -> Method | None:
    """The method at a wire path; None if its service is not routed here.

    A method that this build's protos do not know is passed on as a stream both ways, which on the wire every arity is:
    an older gateway serves a newer service.
    """
    known = METHODS.get(path)
    if known is not None:
        return known
    full, _, name = path.removeprefix("/").rpartition("/")
    service = _NAMES.get(full)
    if service is None or not name:
        return None
    return Method(path, f"{full}/other", service, request_streaming=True, response_streaming=True, known=False)
