"""Processes killed in the middle: at file operations, and at requests to S3, chosen by a seed."""

import itertools
import multiprocessing
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.runtimes.artifacts.errors import Reason, StoreError
from services.runtimes.artifacts.manifest import artifact_id, decode
from services.runtimes.artifacts.store import Store, open_store
from tests.support import artifacts, s3
from tests.support.artifacts import FILES, content_of
from tests.unit.runtimes.artifacts.conftest import Raw, RawBucket, RawFolder

# Whatever changes files tells Python's audit hooks first.
_OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.utime", "fcntl.flock")

Work = Callable[[Store], None]


def publish(store: Store) -> None:
    artifacts.publish(store, 1)


def fetch(store: Store) -> None:
    store.local_folder(store.find()[0].id)


def delete(store: Store) -> None:
    store.delete(store.find(model="unwanted")[0].id)


def use(store: Store) -> None:
    store.use("handwriting-tiny", store.find()[0].id)


def collect(store: Store) -> None:
    store.collect(keep_newest=0)


def hold(store: Store) -> None:
    with store.hold(store.find()[0].id, "a process that was killed"):
        pass


def work_and_die(location: str, work: Work, at: int, variables: dict[str, str], told: Any) -> None:
    """In a process of its own: does the work, and dies at its `at`-th operation on files; 0 to live and count them."""
    os.environ.update(variables)
    # Threads count too, and none may be lost; the first is 1.
    count = itertools.count(1)

    def operation(event: str, _: object) -> None:
        if event in _OPERATIONS and next(count) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    store = open_store(location)
    sys.addaudithook(operation)
    work(store)
    told.send(next(count) - 1)


@pytest.fixture(scope="module")
def processes() -> Any:
    """Starts processes that have imported everything before, in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "s3fs", "aiobotocore.session"])
    return context


def run(processes: Any, location: str, work: Work, at: int = 0, variables: dict[str, str] | None = None) -> int:
    """Runs `work_and_die` to its end; the number of operations, or 0 when it was killed."""
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=work_and_die, args=(location, work, at, variables or {}, sender))
    process.start()
    sender.close()
    process.join()
    assert process.exitcode == (-signal.SIGKILL if at else 0)
    return 0 if at else int(receiver.recv())


@pytest.mark.parametrize("work", [publish, delete, use, collect, hold])
def test_killed_after_any_file_operation_nothing_is_half_there(processes: Any, tmp_path: Path, work: Work) -> None:
    def prepared(name: str) -> tuple[Store, RawFolder]:
        store = open_store(str(tmp_path / name))
        artifacts.publish(store, 0)
        artifacts.publish(store, 2, model="unwanted")
        store.use("kept", store.find(model="handwriting-tiny")[0].id)
        if work is collect:
            store.staging()
        return store, RawFolder(store.location)

    _, raw = prepared("counted")
    operations = run(processes, raw.location, work)
    assert operations > 5
    for at in random.Random(5).sample(range(1, operations + 1), min(30, operations)):
        store, raw = prepared(str(at))
        run(processes, raw.location, work, at)
        there = whole_artifacts(raw)
        assert {stored.id for stored in store.find()} == set(there.values())
        assert "recipe 0" in there
        assert store.used("kept") == there["recipe 0"]
        assert store.used("handwriting-tiny") in (None, there.get("recipe 2"))
        # The lock died with its owner, and what was left behind goes; but a lease counts until its time is over.
        raw.age("leases/", 3600)
        store.unuse("handwriting-tiny")
        collected = store.collect(keep_newest=9)
        assert collected.deleted == ()
        root = Path(raw.location)
        left = [path for path in (root / "staging").iterdir() if not store_holds(store, path)]
        assert left == []
        assert raw.names("leases/") == []
        assert not any(key.endswith(".part") for key in raw.names())
        again = artifacts.publish(store, 1)
        assert again.id == there.get("recipe 1", again.id)
        assert store.verify(again.id) == []


def store_holds(store: Store, path: Path) -> bool:
    """Whether this very process made the staging folder, as one that was prepared."""
    return path.with_suffix("") in store._place.staging._locks


def whole_artifacts(raw: Raw) -> dict[str, str]:
    """Recipe -> id of every artifact that is visible; each is whole."""
    found = {}
    for key in raw.names("artifacts/"):
        _, one, path = key.split("/", 2)
        if path == "manifest.json":
            content = {file: raw.read(f"artifacts/{one}/{file}") for file in FILES}
            assert content == FILES
            assert artifact_id(raw.read(key)) == one
            recipe = decode(raw.read(key)).recipe
            assert recipe not in found
            found[recipe] = one
    return found


def run_until_request(
    processes: Any, server: s3.S3Server, work: Work, at: int, variables: dict[str, str]
) -> tuple[int, int | None]:
    """Runs the work against S3 and kills it as its `at`-th request arrives; how many came, and the exit code."""
    _, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=work_and_die, args=("s3://inkwell/some/where", work, 0, variables, sender))

    def kill(number: int, _: object) -> None:
        if number == at:
            os.kill(process.pid, signal.SIGKILL)
            process_gone.wait()

    process_gone = threading.Event()
    server.watch(kill)
    process.start()
    process.join()
    process_gone.set()
    server.wait_until_idle()
    count = len(server.requests)
    server.watch()
    return count, process.exitcode


@pytest.mark.parametrize("work", [publish, fetch, delete, collect])
def test_killed_at_any_request_nothing_is_half_there(
    processes: Any, bucket: RawBucket, s3_server: s3.S3Server, tmp_path: Path, work: Work
) -> None:
    store = open_store(bucket.location)
    artifacts.publish(store, 0)
    artifacts.publish(store, 2, model="unwanted")
    store.use("kept", store.find(model="handwriting-tiny")[0].id)
    variables = s3.environment(s3_server) | {"XDG_CACHE_HOME": str(tmp_path / "counted")}
    before = {key: bucket.read(key) for key in bucket.names()}

    def reset() -> None:
        for key in bucket.names():
            if before.get(key) != bucket.read(key):
                bucket.remove(key)
        for key, content in before.items():
            if key not in bucket.names():
                bucket.write(key, content)

    requests, code = run_until_request(processes, s3_server, work, 0, variables)
    assert code == 0
    moments = random.Random(5).sample(range(1, requests + 1), min(8 if work is publish else 4, requests))
    for at in moments:
        reset()
        variables["XDG_CACHE_HOME"] = str(tmp_path / str(at))
        _, code = run_until_request(processes, s3_server, work, at, variables)
        assert code == -signal.SIGKILL
        there = whole_artifacts(bucket)
        assert "recipe 0" in there
        assert store.used("kept") == there["recipe 0"]
        # Leases and the lock count until their time is over.
        bucket.age("leases/", 3600)
        bucket.age("lock", 3600)
        if work is publish:
            again = artifacts.publish(store, 1)
            assert again.id == there.get("recipe 1", again.id)
            assert store.verify(again.id) == []
        store.collect(keep_newest=9)
        visible = {stored.id for stored in store.find()}
        assert {key.split("/")[1] for key in bucket.names("artifacts/")} == visible
        assert bucket.names("leases/") == []


def test_a_process_killed_while_it_fetches_leaves_no_broken_file_to_the_next(
    processes: Any, bucket: RawBucket, s3_server: s3.S3Server, tmp_path: Path
) -> None:
    stored = artifacts.publish(open_store(bucket.location))
    counted = s3.environment(s3_server) | {"XDG_CACHE_HOME": str(tmp_path / "counted")}
    operations = run(processes, bucket.location, fetch, 0, counted)
    for at in sorted(random.Random(5).sample(range(1, operations + 1), 5)):
        variables = counted | {"XDG_CACHE_HOME": str(tmp_path / str(at))}
        # Files are fetched at the same time, so their operations come in another order each time.
        receiver, sender = processes.Pipe(duplex=False)
        process = processes.Process(target=work_and_die, args=(bucket.location, fetch, at, variables, sender))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", variables["XDG_CACHE_HOME"])
            store = open_store(bucket.location)
            content = content_of(store.local_folder(stored.id))
            assert content.pop("manifest.json") == stored.manifest_json
            assert content == FILES
            store.collect()
            assert list(store._place.staging.root.iterdir()) == []


def test_the_lock_of_a_process_that_died_is_taken_over_in_time(bucket: RawBucket) -> None:
    store = open_store(bucket.location)
    stored = artifacts.publish(store)
    bucket.write("lock", b"somebody else's")
    bucket.age("lock", 175)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("services.runtimes.artifacts.s3._LOCK_WAIT_S", 0.0)
        with pytest.raises(StoreError, match="locked by others") as raised:
            store.use("handwriting-tiny", stored.id)
        assert raised.value.reason is Reason.UNAVAILABLE
    assert store.used("handwriting-tiny") is None
    bucket.age("lock", 30)
    store.use("handwriting-tiny", stored.id)
    assert store.used("handwriting-tiny") == stored.id
