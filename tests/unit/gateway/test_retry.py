"""What an error's trailers say about trying again."""

import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.retry import RetryWish, backoff_s, wish
from services.kit import errors, faults


def details(milliseconds: int) -> bytes:
    fault = faults.unavailable("ENGINE_LOST", "it died", retry_after_ms=milliseconds)
    return bytes(errors.to_status(fault).SerializeToString())


@pytest.mark.parametrize(
    ("trailing", "expected"),
    [
        ([], RetryWish(True, None)),
        ([("x", "y")], RetryWish(True, None)),
        ([("grpc-retry-pushback-ms", "250")], RetryWish(True, 0.25)),
        ([("grpc-retry-pushback-ms", "0")], RetryWish(True, 0.0)),
        ([("grpc-retry-pushback-ms", "-1")], RetryWish(False, None)),
        ([("grpc-retry-pushback-ms", "soon")], RetryWish(False, None)),
        ([("grpc-status-details-bin", details(1500))], RetryWish(True, 1.5)),
        ([("grpc-status-details-bin", details(1500)), ("grpc-retry-pushback-ms", "20")], RetryWish(True, 0.02)),
        ([("grpc-status-details-bin", b"\xff\xff not protobuf")], RetryWish(True, None)),
        ([("grpc-status-details-bin", status_pb2.Status(code=14).SerializeToString())], RetryWish(True, None)),
    ],
)
def test_wish(trailing: list[tuple[str, str | bytes]], expected: RetryWish) -> None:
    assert wish(trailing) == expected


def test_an_absurd_delay_does_not_break_the_gateway() -> None:
    status = status_pb2.Status(code=14)
    info = error_details_pb2.RetryInfo()
    info.retry_delay.seconds = 2**62
    status.details.add().Pack(info)
    assert wish([("grpc-status-details-bin", status.SerializeToString())]).allowed


@given(st.binary(max_size=200))
def test_any_details_are_survived(found: bytes) -> None:
    assert wish([("grpc-status-details-bin", found)]).allowed


def test_backoff_grows_to_a_bound() -> None:
    waits = [backoff_s(attempt) for attempt in range(1, 12)]
    assert waits == sorted(waits)
    assert waits[0] == 0.05
    assert waits[-1] == 1.0
