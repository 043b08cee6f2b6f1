"""Every fault of a service arrives as the right exception, with its details."""

import pickle

import grpc
import pytest
from google.rpc import status_pb2

import inkwell
from inkwell.errors import error_from_status
from services.kit import errors, faults
from tests.unit.inkwell.fake_server import InkwellServer

FAULTS = [
    (faults.invalid_field("step_count", "0 is not within 1 to 1000"), inkwell.InvalidRequest),
    (faults.not_found("model", "x", ["pen"], field="model"), inkwell.NotFound),
    (faults.overloaded("QUEUE_FULL", "256 calls wait", retry_after_ms=1500), inkwell.Overloaded),
    (faults.too_large("width", "TOO_LARGE", "8192 does not fit the memory"), inkwell.TooLarge),
    (faults.unavailable("LOADING", "the model loads", retry_after_ms=10), inkwell.Unavailable),
    (faults.failed_precondition("NO_HARDWARE", "no cuda here"), inkwell.FailedPrecondition),
    (faults.deadline_too_short("needs 4 s, has 1 s"), inkwell.DeadlineExceeded),
    (faults.unauthenticated("NO_CREDENTIALS", "send a token"), inkwell.Unauthenticated),
    (faults.permission_denied("METHOD_NOT_ALLOWED", "ann may not paint"), inkwell.PermissionDenied),
    (faults.internal("a defect"), inkwell.InternalError),
    (faults.Fault(faults.FaultData(faults.Kind.CANCELLED, "CANCELLED", "somebody cancelled it")), inkwell.Cancelled),
]


@pytest.mark.parametrize(("fault", "kind"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_every_kind_of_fault_has_its_exception(
    client: inkwell.Client, server: InkwellServer, fault: faults.Fault, kind: type[inkwell.InkwellError]
) -> None:
    server.fail_next.extend([fault] * 4)  # the retries of UNAVAILABLE, too
    with pytest.raises(inkwell.InkwellError) as raised:
        client.read(b"say a")
    error = raised.value
    assert type(error) is kind
    assert error.message == fault.data.message
    assert error.reason == fault.data.reason
    assert error.code == errors.CODES[fault.data.kind].name
    assert [(each.field, each.description) for each in error.fields] == [
        (each.field, each.description) for each in fault.data.fields
    ]
    assert error.resource == (fault.data.resource.name if fault.data.resource else "")
    if fault.data.retry_after_ms is None:
        assert error.retry_after_s is None
    else:
        assert error.retry_after_s == fault.data.retry_after_ms / 1000
    assert error.metadata == fault.data.metadata
    assert error.hint.endswith(".")


def test_there_is_an_exception_for_every_kind() -> None:
    assert {fault.data.kind for fault, _ in FAULTS} == set(faults.Kind)


def test_streams_raise_the_same(client: inkwell.Client) -> None:
    with pytest.raises(inkwell.InvalidRequest) as raised:
        client.paint("a cat", steps=0)
    assert raised.value.fields[0].field == "step_count"
    assert raised.value.hint == "Correct step_count."


@pytest.mark.parametrize(
    ("code", "text", "kind"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (9 vs. 8)", inkwell.TooLarge),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "slow down", inkwell.Overloaded),
        (grpc.StatusCode.UNAUTHENTICATED, "who are you", inkwell.Unauthenticated),
        (grpc.StatusCode.PERMISSION_DENIED, "not you", inkwell.PermissionDenied),
        (grpc.StatusCode.INVALID_ARGUMENT, "no", inkwell.InvalidRequest),
        (grpc.StatusCode.UNKNOWN, "", inkwell.InternalError),
        (grpc.StatusCode.DATA_LOSS, "gone", inkwell.InternalError),
    ],
)
def test_a_status_without_details_is_understood_too(
    client: inkwell.Client,
    server: InkwellServer,
    code: grpc.StatusCode,
    text: str,
    kind: type[inkwell.InkwellError],
) -> None:
    server.bare_failure = (code, text)
    with pytest.raises(inkwell.InkwellError) as raised:
        client.read(b"say a")
    assert type(raised.value) is kind
    assert raised.value.message
    assert raised.value.code == code.name


def test_the_hint_of_an_overload_says_when() -> None:
    status = errors.to_status(faults.overloaded("QUEUE_FULL", "full", retry_after_ms=2500))
    assert "in 2.5 s" in error_from_status(status).hint


def test_a_garbled_detail_does_not_hide_the_error() -> None:
    status = errors.to_status(faults.invalid_field("seed", "too high"))
    status.details[1].value = b"\xff\xff\xff"
    error = error_from_status(status)
    assert isinstance(error, inkwell.InvalidRequest)
    assert error.message == "seed: too high"


def test_a_code_that_nobody_knows_is_an_internal_error() -> None:
    assert type(error_from_status(status_pb2.Status(code=77, message="?"))) is inkwell.InternalError


def test_errors_survive_pickling() -> None:
    error = error_from_status(errors.to_status(faults.invalid_field("seed", "too high")))
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is inkwell.InvalidRequest
    assert (again.message, again.fields, again.reason) == (error.message, error.fields, error.reason)
