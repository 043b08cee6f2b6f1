"""What crosses the gateway and what stays."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway import metadata
from services.kit.faults import Fault

SERVED = (("inkwell-pool", "p"), ("inkwell-endpoint", "h:1"), ("inkwell-hardware", "cpu"))
RESERVED = ["te", "user-agent", "content-type", "host", ":path", "grpc-timeout", "grpc-trace-bin", "grpc-encoding"]

keys = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_.", min_size=1, max_size=20)
plain = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)
pairs = st.lists(
    st.tuples(keys, plain) | st.tuples(keys.map(lambda k: k + "-bin"), st.binary(max_size=20)), max_size=8
).filter(lambda found: not any(key in RESERVED or key.startswith("grpc-") for key, _ in found))


@given(pairs)
def test_the_callers_own_metadata_crosses_in_order_with_repeats(found: list[metadata.Pair]) -> None:
    assert list(metadata.to_upstream(found)) == [p for p in found if p[0] not in metadata._HOP]


@pytest.mark.parametrize("key", RESERVED)
def test_what_belongs_to_one_connection_stays(key: str) -> None:
    assert metadata.to_upstream([(key, "v"), ("x", "1")]) == (("x", "1"),)
    assert metadata.to_caller([(key, "v"), ("x", "1")], SERVED) == (("x", "1"), *SERVED)
    assert metadata.trailers([(key, "v"), ("x", "1")]) == (("x", "1"),)


def test_the_status_of_the_endpoint_crosses_whole() -> None:
    found: list[metadata.Pair] = [
        ("grpc-status-details-bin", b"\x08\x0e"),
        ("grpc-retry-pushback-ms", "5"),
        ("grpc-other", "1"),
    ]
    assert metadata.trailers(found) == tuple(found[:2])


def test_an_endpoint_cannot_pretend_to_be_another() -> None:
    assert metadata.to_caller([("inkwell-pool", "q"), ("x", "1")], SERVED) == (("x", "1"), *SERVED)


@pytest.mark.parametrize("value", ["a\r\nb", "\x00", "é", "\x7f"])
def test_a_value_that_http2_cannot_carry_is_refused_by_key(value: str) -> None:
    with pytest.raises(Fault, match=r"metadata\.x-note"):
        metadata.to_upstream([("x-note", value)])
