"""What only a store in S3 can come to: it goes away midway, refuses, breaks off, or is not what it should be."""

import multiprocessing
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest

from services.runtimes.artifacts.errors import Reason, StoreError
from services.runtimes.artifacts.manifest import artifact_id
from services.runtimes.artifacts.store import Store, open_store
from tests.support import s3
from tests.support.artifacts import FILES, content_of, publish
from tests.support.s3 import S3Server, refusal
from tests.unit.runtimes.artifacts.conftest import RawBucket


@pytest.fixture
def store(bucket: RawBucket) -> Store:
    return open_store(bucket.location)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that fails is not tried again, which would only take time."""
    monkeypatch.setattr("services.runtimes.artifacts.s3._TRIES", 1)


def cached(tmp_path: Path) -> list[str]:
    """What a test's cache holds of artifacts, finished or not."""
    found = (path.relative_to(tmp_path / "cache") for path in (tmp_path / "cache").rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in found if "/locks/" not in path.as_posix())


def test_a_manifest_comes_last_and_goes_first(store: Store, bucket: RawBucket, s3_server: S3Server) -> None:
    s3_server.watch()
    stored = publish(store)
    written = [request for request in s3_server.requests if request.startswith("PUT") and "artifacts/" in request]
    assert [request.rpartition(f"{stored.id}/")[2] for request in written] == [*sorted(FILES), "manifest.json"]
    assert bucket.names("artifacts/") == sorted(f"artifacts/{stored.id}/{name}" for name in (*FILES, "manifest.json"))
    assert artifact_id(bucket.read(f"artifacts/{stored.id}/manifest.json")) == stored.id
    s3_server.watch()
    store.delete(stored.id)
    first = next(request for request in s3_server.requests if request.startswith(("DELETE", "POST")))
    assert first.endswith(f"{stored.id}/manifest.json")
    assert bucket.names() == []


def test_large_files_are_uploaded_in_parts(store: Store, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.runtimes.artifacts.s3._PART_BYTES", 5 << 20)
    content = random.Random(5).randbytes((10 << 20) + 3)
    s3_server.watch()
    stored = publish(store, content={**FILES, "encoder.onnx.data": content})
    assert sum("encoder.onnx.data" in request for request in s3_server.requests) == 5  # begin, three parts, end
    assert (store.local_folder(stored.id) / "encoder.onnx.data").read_bytes() == content
    assert b"".join(store.read(stored.id, "encoder.onnx.data", (9 << 20) + 1)) == content[(9 << 20) + 1 :]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("at", [1, 3, 6, 10, 14])
def test_it_goes_away_in_the_middle_of_a_publish(
    bucket: RawBucket, s3_server: S3Server, tmp_path: Path, at: int
) -> None:
    store = open_store(bucket.location)
    earlier = publish(store, 0)

    def stop(number: int, _: object) -> None:
        if number == at:
            s3_server.stop()

    s3_server.watch(stop)
    try:
        with pytest.raises(StoreError, match=f"{s3_server.url} cannot be reached or broke off") as raised:
            publish(store, 1)
        assert raised.value.reason is Reason.UNAVAILABLE
        assert cached(tmp_path) == []
    finally:
        s3_server.wait_until_idle()
        s3_server.watch()
        s3_server.start()
    there = store.find()
    assert earlier in there
    for stored in there:
        assert store.verify(stored.id) == []
    # The lock and the lease count until their time is over; what was uploaded goes then.
    bucket.age("l", 3600)
    store.collect(keep_newest=9)
    assert {name.split("/")[1] for name in bucket.names()} == {stored.id for stored in there}
    assert store.verify(publish(store, 1).id) == []


@pytest.mark.usefixtures("impatient")
def test_it_goes_away_in_the_middle_of_a_fetch(
    store: Store, bucket: RawBucket, s3_server: S3Server, tmp_path: Path
) -> None:
    stored = publish(store)
    for at in range(1, 5):
        s3_server.refuse_from(at)
        with pytest.raises(StoreError, match="cannot be reached or broke off") as raised:
            store.local_folder(stored.id)
        assert raised.value.reason is Reason.UNAVAILABLE
        assert cached(tmp_path) == []
    s3_server.watch()
    content = content_of(store.local_folder(stored.id))
    assert content.pop("manifest.json") == stored.manifest_json
    assert content == FILES


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (b"graph of the Encoder", "encoder.onnx is not what its manifest says"),
        (b"graph of", "has 8 bytes of it, should have 20"),
    ],
)
def test_a_download_that_is_not_whole_is_never_used(
    store: Store, s3_server: S3Server, tmp_path: Path, wrong: bytes, said: str
) -> None:
    stored = publish(store)
    s3_server.watch(
        lambda _, asked: ("206 Partial Content", wrong) if asked["PATH_INFO"].endswith("/encoder.onnx") else None
    )
    with pytest.raises(StoreError, match=said) as raised:
        store.local_folder(stored.id)
    assert raised.value.reason is Reason.DAMAGED
    assert cached(tmp_path) == []
    assert len(store.verify(stored.id)) == 1
    s3_server.watch()
    assert (store.local_folder(stored.id) / "encoder.onnx").read_bytes() == FILES["encoder.onnx"]


def test_a_cache_without_space_is_told(store: Store, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = publish(store, content={**FILES, "encoder.onnx.data": bytes(300_000)})
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_disk))
    with pytest.raises(StoreError, match=f"bytes, and .* are free in {small_disk}.*XDG_CACHE_HOME") as raised:
        open_store(store.location).local_folder(stored.id)
    assert raised.value.reason is Reason.FULL
    # As when others fill it meanwhile.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 30))
    with pytest.raises(StoreError, match=f"fetching .*no space is left in {small_disk}") as raised:
        open_store(store.location).local_folder(stored.id)
    assert raised.value.reason is Reason.FULL
    assert not any(path.is_file() for path in small_disk.rglob("staging/*"))


def fetch(location: str, artifact: str, variables: dict[str, str], ready: Any, told: Any) -> None:
    """In a process of its own: waits for the others and fetches an artifact."""
    os.environ.update(variables)
    store = open_store(location)
    store.find()
    ready.wait()
    told.put(content_of(store.local_folder(artifact)))


def test_processes_that_want_the_same_fetch_it_once(
    store: Store, bucket: RawBucket, s3_server: S3Server, tmp_path: Path
) -> None:
    stored = publish(store)
    context = multiprocessing.get_context("forkserver")
    with context.Manager() as shared:
        ready, told = shared.Barrier(3), shared.Queue()
        variables = s3.environment(s3_server) | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        s3_server.watch()
        processes = [
            context.Process(target=fetch, args=(bucket.location, stored.id, variables, ready, told)) for _ in range(3)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        for _ in processes:
            content = told.get_nowait()
            assert content.pop("manifest.json") == stored.manifest_json
            assert content == FILES
    for path in FILES:
        assert (
            sum(request == f"GET /inkwell/some/where/artifacts/{stored.id}/{path}" for request in s3_server.requests)
            == 1
        )


def test_a_cached_copy_is_used_again_while_it_is_whole(store: Store, s3_server: S3Server, tmp_path: Path) -> None:
    stored = publish(store)
    folder = store.local_folder(stored.id)
    s3_server.watch()
    assert store.local_folder(stored.id) == folder
    assert not any("encoder" in request for request in s3_server.requests)
    (folder / "encoder.onnx").write_bytes(b"")
    assert content_of(store.local_folder(stored.id))["encoder.onnx"] == FILES["encoder.onnx"]
    # With the artifact its copy goes, but not while somebody here runs it.
    other = open_store(store.location)
    with store.hold(stored.id, "OCR service"):
        store.collect(keep_newest=0)
        assert folder.exists()
    store.delete(stored.id)
    assert other.collect().freed_bytes >= stored.size_bytes
    assert cached(tmp_path) == []


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("answer", "reason", "said"),
    [
        (refusal("403 Forbidden", "InvalidAccessKeyId"), Reason.DENIED, "does not accept the credentials.*AWS_ACCESS"),
        (refusal("403 Forbidden", "SignatureDoesNotMatch"), Reason.DENIED, "does not accept the credentials"),
        (refusal("400 Bad Request", "ExpiredToken"), Reason.DENIED, "does not accept the credentials"),
        (refusal("403 Forbidden", "AccessDenied"), Reason.DENIED, "credentials do not allow it .*s3:PutObject"),
        (refusal("404 Not Found", "NoSuchBucket"), Reason.NOT_FOUND, "there is no bucket inkwell at http"),
        (refusal("507 Insufficient Storage", "XMinioStorageFull"), Reason.FULL, "is full .*raise its quota"),
        (refusal("503 Slow Down", "SlowDown"), Reason.UNAVAILABLE, "broke off .*SlowDown"),
        (refusal("500 Internal Server Error", "InternalError"), Reason.UNAVAILABLE, "broke off"),
        (("200 OK", b"this is no XML"), Reason.UNAVAILABLE, "broke off"),
    ],
)
def test_what_it_refuses_is_told_with_what_would_help(
    bucket: RawBucket, s3_server: S3Server, tmp_path: Path, answer: s3.Answer, reason: Reason, said: str
) -> None:
    store = open_store(bucket.location)
    s3_server.watch(lambda *_: answer)
    for attempt in (store.find, lambda: publish(store), lambda: store.collect()):
        with pytest.raises(StoreError, match=said) as raised:
            attempt()
        assert raised.value.reason is reason
    assert cached(tmp_path) == []


def test_a_bucket_that_is_not_there_is_told(bucket: RawBucket) -> None:
    store = open_store("s3://other-bucket/prefix")
    for attempt in (store.find, store.users, lambda: store.use("m", "0" * 64), lambda: publish(store)):
        with pytest.raises(StoreError, match="there is no bucket other-bucket at http.*create it") as raised:
            attempt()
        assert raised.value.reason is Reason.NOT_FOUND


def test_missing_credentials_are_told(bucket: RawBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StoreError, match="does not accept the credentials.*check AWS_ACCESS_KEY_ID") as raised:
        open_store(bucket.location).find()
    assert raised.value.reason is Reason.DENIED


def test_a_store_that_may_only_be_read_is_served_from(
    store: Store, s3_server: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    stored = publish(store)
    s3_server.watch(
        lambda _, asked: (
            None if asked["REQUEST_METHOD"] in ("GET", "HEAD") else refusal("403 Forbidden", "AccessDenied")
        )
    )
    reader = open_store(store.location)
    with reader.hold(stored.id, "OCR service"):
        assert content_of(reader.local_folder(stored.id))["encoder.onnx"] == FILES["encoder.onnx"]
    assert "without a lease" in caplog.text
    with pytest.raises(StoreError, match="do not allow it"):
        reader.use("handwriting-tiny", stored.id)


def test_a_server_without_conditional_writes_is_refused(store: Store, bucket: RawBucket, s3_server: S3Server) -> None:
    def ignore(_: int, asked: dict[str, Any]) -> None:
        asked.pop("HTTP_IF_NONE_MATCH", None)

    s3_server.watch(ignore)
    with pytest.raises(StoreError, match=r"ignores conditional writes \(If-None-Match\)") as raised:
        publish(store)
    assert raised.value.reason is Reason.INVALID
    assert bucket.names() == []


@pytest.mark.parametrize("answer", [refusal("503 Slow Down", "SlowDown"), refusal("500 Internal", "InternalError")])
def test_what_fails_once_is_tried_again(store: Store, s3_server: S3Server, answer: s3.Answer) -> None:
    stored = publish(store)
    s3_server.watch(lambda number, _: answer if number == 1 else None)
    assert store.find() == [stored]


def test_a_lock_whose_answer_was_lost_is_still_ones_own(store: Store, s3_server: S3Server) -> None:
    stored = publish(store)
    s3_server.watch()
    s3_server.lose_answer = 1
    store.use("handwriting-tiny", stored.id)
    assert s3_server.requests[:2] == ["PUT /inkwell/some/where/lock"] * 2
    assert store.used("handwriting-tiny") == stored.id


def test_uploads_that_nobody_ends_are_swept(store: Store, bucket: RawBucket) -> None:
    client = boto3.client("s3")
    orphan, held = "0" * 64, publish(store).id
    bucket.write(f"artifacts/{orphan}/encoder.onnx", b"12345")
    for one in (orphan, held):
        client.create_multipart_upload(Bucket="inkwell", Key=f"some/where/artifacts/{one}/large")
    with store._leases.publishing(orphan), store.hold(held, "OCR service"):
        assert open_store(store.location).collect().freed_bytes == 0
        assert len(client.list_multipart_uploads(Bucket="inkwell")["Uploads"]) == 2
    assert open_store(store.location).collect().freed_bytes == 5
    assert "Uploads" not in client.list_multipart_uploads(Bucket="inkwell")
    assert {name.split("/")[1] for name in bucket.names()} == {held}


@pytest.mark.parametrize("location", ["s3://", "s3://B", "s3://bucket/../other", "s3://bucket/a//b", "s3:///prefix"])
def test_what_is_no_location_in_s3_is_refused(location: str) -> None:
    with pytest.raises(StoreError, match="give it as s3://bucket/prefix") as raised:
        open_store(location)
    assert raised.value.reason is Reason.INVALID
