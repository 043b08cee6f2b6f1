"""Reading many pictures over one stream with the blocking client."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import inkwell
from inkwell.batch import WINDOW
from inkwell.channel import BATCH_REQUEST_BYTES_MOST
from tests.unit.inkwell.fake_server import TIMEOUT_S, InkwellServer


def texts(outcomes: list[tuple[str, inkwell.Reading | inkwell.InkwellError]]) -> dict[str, str]:
    return {name: got.text if isinstance(got, inkwell.Reading) else type(got).__name__ for name, got in outcomes}


def test_ids_are_paths_positions_or_the_callers_own(client: inkwell.Client, tmp_path: Path) -> None:
    path = tmp_path / "line.png"
    path.write_bytes(b"say file")
    outcomes = list(client.read_many([path, b"say bytes", ("mine", b"say pair"), str(path)]))
    assert [name for name, _ in outcomes] == [str(path), "1", "mine", str(path)]
    assert texts(outcomes) == {str(path): "file", "1": "bytes", "mine": "pair"}


def test_answers_come_as_they_are_ready(client: inkwell.Client) -> None:
    outcomes = list(client.read_many([("slow", b"last"), ("quick", b"say a")]))
    assert [name for name, _ in outcomes] == ["quick", "slow"]


def test_one_bad_picture_fails_alone(client: inkwell.Client) -> None:
    outcomes = dict(client.read_many([("a", b"say a"), ("b", b"bad"), ("c", b"say c")]))
    error = outcomes["b"]
    assert isinstance(error, inkwell.InvalidRequest)
    assert error.reason == "BAD_IMAGE"
    assert error.fields[0].field == "image.content"
    assert texts(list(outcomes.items())) == {"a": "a", "b": "InvalidRequest", "c": "c"}


def test_a_file_that_cannot_be_read_fails_alone(client: inkwell.Client, tmp_path: Path) -> None:
    outcomes = dict(client.read_many([tmp_path / "missing.png", ("a", b"say a")]))
    error = outcomes[str(tmp_path / "missing.png")]
    assert isinstance(error, inkwell.InvalidRequest)
    assert "No such file" in error.message
    assert isinstance(outcomes["a"], inkwell.Reading)


def test_a_picture_too_long_for_the_stream_fails_alone(client: inkwell.Client, server: InkwellServer) -> None:
    outcomes = dict(client.read_many([("huge", bytes(BATCH_REQUEST_BYTES_MOST)), ("a", b"say a")]))
    assert isinstance(outcomes["huge"], inkwell.TooLarge)
    assert isinstance(outcomes["a"], inkwell.Reading)
    assert len(server.requests) == 2  # the call, and the picture that fits


def test_ids_may_repeat_and_be_long(client: inkwell.Client) -> None:
    name = "n" * 1000
    outcomes = list(client.read_many([(name, b"say a"), (name, b"say b")]))
    assert [(each, got.text) for each, got in outcomes if isinstance(got, inkwell.Reading)] == [
        (name, "a"),
        (name, "b"),
    ]


def test_pictures_are_taken_only_as_far_as_answers_are(client: inkwell.Client, server: InkwellServer) -> None:
    taken = 0
    full = threading.Event()

    def endless() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            if taken == WINDOW + 1:
                full.set()
            yield b"say a"

    outcomes = client.read_many(endless())
    next(outcomes)
    # One answer is taken but its place is free only when the next one is asked for.
    next(outcomes)
    assert full.wait(TIMEOUT_S)
    assert taken == WINDOW + 1
    outcomes.close()


def test_nothing_is_an_empty_stream(client: inkwell.Client) -> None:
    assert list(client.read_many([])) == []


def test_closing_cancels_the_call_at_the_server(client: inkwell.Client, server: InkwellServer) -> None:
    outcomes = client.read_many([("a", b"say a"), ("b", b"hold"), ("c", b"say c")])
    assert next(outcomes)[0] == "a"
    assert server.held.wait(TIMEOUT_S)
    outcomes.close()
    assert server.cancelled.wait(TIMEOUT_S)


def test_what_the_callers_iterable_raises_is_raised(client: inkwell.Client) -> None:
    def broken() -> Iterator[bytes]:
        yield b"say a"
        raise LookupError("the caller's own")

    with pytest.raises(LookupError, match="own"):
        list(client.read_many(broken()))


def test_options_that_no_picture_could_be_sent_with_are_raised(client: inkwell.Client) -> None:
    with pytest.raises(inkwell.InvalidRequest) as raised:
        list(client.read_many([b"say a"], beam_width=2**40))
    assert raised.value.fields[0].field == "decoding.beam_width"


def test_a_stream_that_breaks_raises_after_what_was_answered(client: inkwell.Client, server: InkwellServer) -> None:
    server.break_batch_after = 2
    got: list[str] = []
    with pytest.raises(inkwell.Unavailable) as raised:
        got.extend(name for name, _ in client.read_many([b"say a", b"say b", b"say c"]))
    assert got == ["0", "1"]
    assert raised.value.reason == "ENGINE_LOST"
    assert raised.value.retry_after_s == 0.5


def test_a_picture_left_without_an_answer_is_told(client: inkwell.Client) -> None:
    outcomes = dict(client.read_many([("a", b"say a"), ("b", b"ignored")]))
    assert isinstance(outcomes["a"], inkwell.Reading)
    assert isinstance(outcomes["b"], inkwell.InternalError)


def test_options_go_with_every_picture(client: inkwell.Client, server: InkwellServer) -> None:
    list(client.read_many([b"say a", b"say b"], model="m", beam_width=3))
    assert [(each.model, each.decoding.beam_width) for each in server.requests[1:]] == [("m", 3), ("m", 3)]
