"""Reading with the blocking client."""

import threading
from pathlib import Path

import pytest

import inkwell
from inkwell.converters import read
from inkwell.ocr.v1 import ocr_pb2
from tests.unit.inkwell.fake_server import TIMEOUT_S, InkwellServer


def test_a_reading_has_everything_the_server_said(client: inkwell.Client) -> None:
    reading = client.read(b"say hi")
    assert reading.text == "hi"
    assert reading.confidence == pytest.approx(0.6)
    assert reading.confidence_calibrated
    assert reading.hypotheses[0].confidence == pytest.approx(0.9)
    assert not reading.blank
    assert not reading.repetition_suspected
    assert reading.log_probability == -0.5
    assert [token.text for token in reading.tokens] == ["h", "i"]
    assert reading.tokens[1] == inkwell.Token(id=1, text="i", log_probability=-0.25, confidence=0.75)
    assert [each.text for each in reading.alternatives] == ["HI"]
    assert reading.hypotheses[0].score == -0.125
    assert not reading.truncated
    assert reading.model == "pen"
    assert reading.timing == inkwell.Timing(queue_ms=1.5, engine_ms=20)
    assert reading.served_by == inkwell.ServedBy(hardware="cpu", pool="pool-a", endpoint="10.0.0.1:1")


@pytest.mark.parametrize("kind", [str, Path])
def test_pictures_come_from_files_too(client: inkwell.Client, tmp_path: Path, kind: type) -> None:
    (tmp_path / "line.png").write_bytes(b"say from a file")
    assert client.read(kind(tmp_path / "line.png")).text == "from a file"


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_bytes_will_do(client: inkwell.Client, kind: type) -> None:
    assert client.read(kind(b"say bytes")).text == "bytes"


def test_a_missing_file_is_an_oserror(client: inkwell.Client, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        client.read(tmp_path / "missing.png")


def test_only_options_that_were_given_are_sent(client: inkwell.Client, server: InkwellServer) -> None:
    client.read(b"say a")
    client.read(
        b"say a", model="m", languages="fr", beam_width=0, hypothesis_count=2, length_penalty=-0.5,
        max_new_token_count=9, no_repeat_ngram_size=3, early_stopping=inkwell.EarlyStopping.NEVER,
    )  # fmt: skip
    plain, full = server.requests
    assert plain.decoding.ListFields() == []
    assert (plain.model, list(plain.language_hints)) == ("", [])
    assert (full.model, list(full.language_hints)) == ("m", ["fr"])
    # 0 is sent as it is: the server decides what to say to it.
    assert {field.name: value for field, value in full.decoding.ListFields()} == {
        "beam_width": 0, "hypothesis_count": 2, "length_penalty": -0.5, "max_new_token_count": 9,
        "no_repeat_ngram_size": 3, "early_stopping": ocr_pb2.EARLY_STOPPING_NEVER,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("option", "value"), [("beam_width", 2**31), ("beam_width", "4"), ("length_penalty", "x"), ("model", "\ud800")]
)
def test_what_protobuf_cannot_carry_is_refused_by_name(
    client: inkwell.Client, server: InkwellServer, option: str, value: object
) -> None:
    with pytest.raises(inkwell.InvalidRequest) as raised:
        client.read(b"say a", **{option: value})  # type: ignore[arg-type]
    assert raised.value.fields[0].field.endswith(option)
    assert not server.requests


def test_what_makes_a_reading_doubtful_is_told(client: inkwell.Client) -> None:
    assert client.read(b"say again and again and again").repetition_suspected
    blank = client.read(b"blank")
    assert (blank.blank, blank.text, blank.confidence_calibrated) == (True, "", False)


def test_a_server_that_tells_no_confidence_of_the_line_gives_that_of_the_best_text() -> None:
    message = ocr_pb2.Recognition(hypotheses=[ocr_pb2.Hypothesis(text="a", confidence=0.25)])
    assert read.reading(message, inkwell.ServedBy()).confidence == 0.25
    message.confidence_calibrated = True  # this one does, and it is 0
    assert read.reading(message, inkwell.ServedBy()).confidence == 0


def test_languages_may_come_from_an_iterator(client: inkwell.Client, server: InkwellServer) -> None:
    list(client.read_many([b"say a", b"say b"], languages=iter(["fr", "de"])))
    assert [list(each.language_hints) for each in server.requests[1:]] == [["fr", "de"], ["fr", "de"]]


def test_events_come_in_order_and_end_with_the_result(client: inkwell.Client) -> None:
    events = list(client.read_stream(b"say hello"))
    assert events[:3] == [
        inkwell.Queued(sequence=1, position=2),
        inkwell.Started(sequence=2, hardware="cpu", runtime="torch", model="pen"),
        inkwell.Partial(sequence=3, text="say h", token_count=5),
    ]
    # The fourth was of a kind that this version does not know.
    assert len(events) == 4
    assert isinstance(events[3], inkwell.ReadResult)
    assert events[3].reading.text == "hello"
    assert events[3].reading.served_by == inkwell.ServedBy("cpu", "torch", "pool-a", "10.0.0.1:1")


def test_events_may_be_watched_while_reading(client: inkwell.Client) -> None:
    seen: list[inkwell.ReadEvent] = []
    reading = client.read(b"say hello", on_event=seen.append)
    assert [type(event) for event in seen] == [
        inkwell.Queued, inkwell.Started, inkwell.Partial, inkwell.ReadResult,
    ]  # fmt: skip
    assert reading.text == "hello"


def test_closing_the_iterator_cancels_the_call_at_the_server(client: inkwell.Client, server: InkwellServer) -> None:
    events = client.read_stream(b"hold")
    assert [type(next(events)) for _ in range(3)][-1] is inkwell.Partial
    assert server.held.wait(TIMEOUT_S)
    events.close()
    assert server.cancelled.wait(TIMEOUT_S)


def test_an_error_in_the_callback_cancels_the_call_and_is_raised(client: inkwell.Client, server: InkwellServer) -> None:
    def fail(event: inkwell.ReadEvent) -> None:
        if isinstance(event, inkwell.Partial):
            assert server.held.wait(TIMEOUT_S)
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        client.read(b"hold", on_event=fail)
    assert server.cancelled.wait(TIMEOUT_S)


def test_closing_the_client_cancels_what_is_under_way(server: InkwellServer) -> None:
    client = inkwell.Client(server.address)
    ended: list[BaseException] = []

    def read() -> None:
        try:
            client.read(b"hold")
        except inkwell.InkwellError as error:
            ended.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    assert server.held.wait(TIMEOUT_S)
    client.close()
    reader.join(TIMEOUT_S)
    assert [type(error) for error in ended] == [inkwell.Cancelled]
    assert server.cancelled.wait(TIMEOUT_S)


def test_a_call_ends_at_its_timeout(client: inkwell.Client, server: InkwellServer) -> None:
    with pytest.raises(inkwell.DeadlineExceeded) as raised:
        client.read(b"hold", timeout_s=0.2)
    assert server.address in raised.value.message
    assert server.cancelled.wait(TIMEOUT_S)


def test_the_timeout_is_the_clients_unless_the_call_has_its_own(client: inkwell.Client, server: InkwellServer) -> None:
    client.read(b"say a")
    client.read(b"say a", timeout_s=5)
    with inkwell.Client(server.address, timeout_s=None) as patient:
        patient.read(b"say a")
    default, own, none = server.time_left_s
    assert default is not None
    assert 5 < default < 21
    assert own is not None
    assert own < 6
    assert none is None or none > 1e6


def test_an_answer_without_a_text_is_the_servers_fault(client: inkwell.Client, server: InkwellServer) -> None:
    with pytest.raises(inkwell.InternalError, match="without a text"):
        client.read(b"nothing")
    server.end_without_result = True
    with pytest.raises(inkwell.InternalError, match="without a result"):
        list(client.read_stream(b"say a"))


def test_hardware_priority_and_metadata_go_with_every_call(server: InkwellServer) -> None:
    with inkwell.Client(
        server.address, hardware="cuda, cpu", priority="high", metadata={"x-team": "archive"}
    ) as client:
        client.read(b"say a")
        list(client.read_stream(b"say a"))
        list(client.read_many([b"say a"]))
        client.models()
    assert len(server.metadata) == 5
    for metadata in server.metadata:
        assert metadata["inkwell-hardware"] == "cuda, cpu"
        assert metadata["inkwell-priority"] == "high"
        assert metadata["x-team"] == "archive"
        assert metadata["user-agent"].startswith("inkwell-python/")


@pytest.mark.parametrize("metadata", [{"Upper": "x"}, {"": "x"}, {"a b": "x"}, {"key": "Ünicode"}, {"key": "a\nb"}])
def test_metadata_that_headers_cannot_carry_is_refused(metadata: dict[str, str]) -> None:
    with pytest.raises(inkwell.InvalidRequest):
        inkwell.Client("localhost:1", metadata=metadata)
