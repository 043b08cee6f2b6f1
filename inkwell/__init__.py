"""Inkwell's client: handwriting in, text out; a prompt in, a picture out.

from inkwell import Client

with Client("localhost:50050") as client:
    print(client.read("line.png").text)
    client.paint("grinning face", seed=7)[0].save("face.png")
"""

from inkwell.aio import AsyncClient
from inkwell.client import Client
from inkwell.embedded import embedded_parameters
from inkwell.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    InkwellError,
    InternalError,
    InvalidRequest,
    NotFound,
    Overloaded,
    PermissionDenied,
    TooLarge,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from inkwell.types import (
    Decoding,
    DiffusionModel,
    Endpoint,
    EndpointState,
    GenerationParameters,
    Hypothesis,
    Image,
    ImageSource,
    Model,
    ModelState,
    OcrModel,
    PaintEvent,
    PaintResult,
    Partial,
    Picture,
    Pool,
    Preview,
    Progress,
    Queued,
    ReadEvent,
    Reading,
    ReadResult,
    Scheduler,
    Started,
    Timing,
    Token,
)
from inkwell.version import __version__

__all__ = [
    "AsyncClient",
    "Cancelled",
    "Client",
    "DeadlineExceeded",
    "Decoding",
    "DiffusionModel",
    "Endpoint",
    "EndpointState",
    "FailedPrecondition",
    "FieldViolation",
    "GenerationParameters",
    "Hypothesis",
    "Image",
    "ImageSource",
    "InkwellError",
    "InternalError",
    "InvalidRequest",
    "Model",
    "ModelState",
    "NotFound",
    "OcrModel",
    "Overloaded",
    "PaintEvent",
    "PaintResult",
    "Partial",
    "PermissionDenied",
    "Picture",
    "Pool",
    "Preview",
    "Progress",
    "Queued",
    "ReadEvent",
    "ReadResult",
    "Reading",
    "Scheduler",
    "Started",
    "Timing",
    "Token",
    "TooLarge",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "__version__",
    "embedded_parameters",
]
