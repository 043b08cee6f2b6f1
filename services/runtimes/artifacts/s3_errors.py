"""What S3 and the way to it answer with, as StoreErrors that say what would help."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from services.runtimes.artifacts.errors import Reason, StoreError

# Error codes of the S3 API.
_MISSING = ("NoSuchKey", "404", "NoSuchUpload")
_CONFLICT = ("PreconditionFailed", "412", "ConditionalRequestConflict")
_CREDENTIALS = (
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "AuthorizationHeaderMalformed",
)


class ObjectMissingError(Exception):
    """There is no such object; whoever asked knows what that means."""


class PreconditionError(Exception):
    """A conditional write was refused, because of another's."""


@contextmanager
def explained_s3(what: str, where: str) -> Iterator[None]:
    """Turns whatever s3fs, botocore and aiohttp raise into a StoreError, ObjectMissingError or PreconditionError."""
    try:
        yield
    except (StoreError, ObjectMissingError, PreconditionError):
        raise
    except Exception as error:  # noqa: BLE001 - three libraries' trees of exceptions, and none may get through
        raise _translated(error, what, where) from error


def _translated(error: Exception, what: str, where: str) -> Exception:
    code = _code(error)
    said = f"{code}: {error}" if code and code not in str(error) else str(error) or type(error).__name__
    bucket = where.removeprefix("s3://").partition("/")[0]
    if code == "NoSuchBucket" or (code == "404" and "Bucket" in _operation(error)):
        return StoreError(
            Reason.NOT_FOUND,
            f"{what}: there is no bucket {bucket} at {_endpoint()}; create it, or correct the setting of the artifact"
            " store or AWS_ENDPOINT_URL",
        )
    if code in _MISSING or isinstance(error, FileNotFoundError):
        return ObjectMissingError(said)
    if code in _CONFLICT:
        return PreconditionError(said)
    if code in _CREDENTIALS or type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        return StoreError(
            Reason.DENIED,
            f"{what}: {_endpoint()} does not accept the credentials for {where} ({said}); check AWS_ACCESS_KEY_ID,"
            " AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN and AWS_REGION",
        )
    if code in ("AccessDenied", "403", "AllAccessDisabled") or isinstance(error, PermissionError):
        return StoreError(
            Reason.DENIED,
            f"{what}: the credentials do not allow it in {where} ({said}); it takes s3:ListBucket, s3:GetObject,"
            " s3:PutObject, s3:DeleteObject, s3:AbortMultipartUpload and s3:ListBucketMultipartUploads",
        )
    if code in ("EntityTooLarge", "QuotaExceeded", "XMinioStorageFull", "InsufficientStorage", "507"):
        return StoreError(Reason.FULL, f"{what}: {where} is full ({said}); delete artifacts, or raise its quota")
    return StoreError(
        Reason.UNAVAILABLE,
        f"{what}: {_endpoint()} cannot be reached or broke off ({said}); nothing that was stored before is harmed, try"
        " again when it is back",
    )


def _client_error(error: BaseException) -> BaseException | None:
    """botocore's ClientError behind an exception: s3fs raises an OSError from it."""
    seen = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        if isinstance(getattr(one, "response", None), dict):
            return one
        one = one.__cause__ or one.__context__
    return None


def _code(error: Exception) -> str:
    behind = _client_error(error)
    return str(getattr(behind, "response", {}).get("Error", {}).get("Code", "")) if behind else ""


def _operation(error: Exception) -> str:
    return str(getattr(_client_error(error), "operation_name", ""))


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "Amazon S3"
