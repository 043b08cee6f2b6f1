"""A store in S3 or what speaks its protocol: PREFIX/artifacts/ID/…, leases/, used/ and lock.

An artifact exists when its manifest.json does, which is uploaded last and deleted first. One process at a time decides
what appears and what goes, by a lock object that conditional writes guard (If-None-Match, If-Match): Amazon S3 has them
since November 2024, and so have MinIO, Ceph and R2; a server without them is refused. Files are read from a cache on
this machine, where they appear only once their sha-256 was checked.
"""

import contextlib
import fcntl
import logging
import os
import random
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from services.runtimes.artifacts.contents import sha256_of
from services.runtimes.artifacts.errors import Reason, StoreError, explained
from services.runtimes.artifacts.folder import size_problem
from services.runtimes.artifacts.manifest import FILE_NAME, File
from services.runtimes.artifacts.place import ARTIFACTS, CHUNK_BYTES, Note
from services.runtimes.artifacts.s3_errors import ObjectMissingError, PreconditionError, explained_s3
from services.runtimes.artifacts.staging import Staging, size_of, sync_all
from services.runtimes.artifacts.user_folders import cache_folder

_T = TypeVar("_T")

log = logging.getLogger(__name__)

_LOCK = "lock"
_LOCATION = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*))?")
# Read with one request.
_RANGE_BYTES = 8 << 20
# Files of twice the size are uploaded in parts, several at a time; S3 takes 10,000 parts of 5 MiB at least.
_PART_BYTES = 32 << 20
# Ranges of files, and small objects, that are read at a time.
_AT_A_TIME = 8
# The lock is held for a few small requests. Each may take _CONNECT_S + _READ_S and be tried again, so an owner that is
# alive is done well before its lock counts as left by a dead one.
_LOCK_STALE_S = 180.0
_LOCK_WAIT_S = 2 * _LOCK_STALE_S
_CONNECT_S, _READ_S, _TRIES = 5, 20, 2
# S3's own limit on keys in one DeleteObjects request.
_DELETE_MOST = 1000


class Bucket:
    """A `Place` in S3. Nothing is contacted before something is asked."""

    def __init__(self, location: str, *, cache: Path | None = None) -> None:
        """cache: a folder on this machine; None takes one in the user's cache folder. Raises StoreError."""
        found = _LOCATION.fullmatch(location)
        prefix = (found[2] or "").strip("/") if found else ""
        if found is None or any(part in ("", ".", "..") for part in prefix.split("/") if prefix):
            raise StoreError(
                Reason.INVALID,
                f"artifact store {location!r}: this is no location in S3; give it as s3://bucket/prefix, the bucket"
                " with 3 to 63 lower-case letters, digits, dots and hyphens",
            )
        self._bucket, self._prefix = found[1], f"{prefix}/" if prefix else ""
        self.where = f"s3://{self._bucket}/{self._prefix}".rstrip("/")
        self._cache = cache or cache_folder() / "artifacts" / sha256(self.where.encode()).hexdigest()[:16]
        self.staging = Staging(self._cache / "staging")
        self._opened: Any = None
        self._conditional = False  # whether the server was seen to refuse a conditional write

    # The lock.

    @contextmanager
    def locked(self) -> Iterator[None]:
        mine = f"{secrets.token_hex(8)}: process {os.getpid()} on {socket.gethostname()}\n".encode()
        self._lock(mine)
        try:
            yield
        finally:
            try:
                # Another process's, if this one was stopped for longer than a lock counts.
                if self._read(_LOCK, "unlocking the artifact store") == mine:
                    self._call("delete_object", "unlocking the artifact store", Key=self._key(_LOCK))
            except StoreError as error:
                log.warning("the lock of %s is left to end by its age: %s", self.where, error)

    def _lock(self, content: bytes) -> None:
        what, key = "locking the artifact store", self._key(_LOCK)
        give_up = time.monotonic() + _LOCK_WAIT_S
        wait_s = 0.02
        while True:
            try:
                self._call("put_object", what, Key=key, Body=content, IfNoneMatch="*")
                break
            except PreconditionError:
                pass
            try:
                held = self._call("head_object", what, Key=key)
            except ObjectMissingError:  # let go just now
                continue
            if self._read(_LOCK, what) == content:  # written after all, by a try whose answer was lost
                break
            if _date_of(held) - held["LastModified"].timestamp() > _LOCK_STALE_S:
                with contextlib.suppress(PreconditionError, ObjectMissingError):  # another was quicker
                    self._call("put_object", what, Key=key, Body=content, IfMatch=held["ETag"])
                    break
            elif time.monotonic() > give_up:
                raise StoreError(
                    Reason.UNAVAILABLE, f"{what}: {self.where} has been locked by others all the time; try again"
                )
            time.sleep(wait_s * random.uniform(0.5, 1.5))  # noqa: S311 - nobody is to guess it
            wait_s = min(2 * wait_s, 1.0)
        if not self._conditional:
            try:
                self._call("put_object", what, Key=key, Body=content, IfNoneMatch="*")
            except PreconditionError:
                self._conditional = True
                return
            raise StoreError(
                Reason.INVALID,
                f"{what}: the server of {self.where} ignores conditional writes (If-None-Match), so processes could"
                " destroy each other's artifacts; update it, or choose another artifact store",
            )

    # Looking.

    def now(self) -> float:
        # A listing, and not HeadBucket: an answer to HEAD has no body to say what is wrong.
        return _date_of(self._call("list_objects_v2", "reading the artifact store", MaxKeys=1))

    def ids(self) -> dict[str, float]:
        found = {}
        for key, (_, changed_at) in self._entries(f"{ARTIFACTS}/", "listing artifacts").items():
            one, _, path = key.removeprefix(f"{ARTIFACTS}/").partition("/")
            if path == FILE_NAME:
                found[one] = changed_at
        return found

    def manifest(self, artifact_id: str) -> bytes | None:
        return self._read(f"{ARTIFACTS}/{artifact_id}/{FILE_NAME}", "reading a manifest")

    def chunks(self, artifact_id: str, file: File, offset: int) -> Iterator[bytes]:
        while offset < file.size_bytes:
            content = self._range(artifact_id, file, offset)
            offset += len(content)
            for start in range(0, len(content), CHUNK_BYTES):
                yield content[start : start + CHUNK_BYTES]

    def _range(self, artifact_id: str, file: File, start: int) -> bytes:
        """Up to _RANGE_BYTES of a file from there on."""
        what = f"reading {file.path} of artifact {artifact_id[:12]}"
        path = f"{self._bucket}/{self._key(f'{ARTIFACTS}/{artifact_id}/{file.path}')}"
        end = min(start + _RANGE_BYTES, file.size_bytes)
        try:
            with explained_s3(what, self.where):
                content: bytes = self._files().cat_file(path, start=start, end=end)
        except ObjectMissingError:
            raise StoreError(
                Reason.DAMAGED, f"{what}: the file is gone from {self.where}; the artifact was deleted, or is damaged"
            ) from None
        if len(content) != end - start:
            raise StoreError(
                Reason.DAMAGED,
                f"{what}: {self.where} has {start + len(content)} bytes of it, should have {file.size_bytes};"
                " delete the artifact and compile it again",
            )
        return content

    def folder(self, artifact_id: str, files: Sequence[File], manifest_json: bytes) -> Path:
        folder = self._cache / ARTIFACTS / artifact_id
        if not size_problem(folder, files):
            return folder
        what = f"fetching artifact {artifact_id[:12]} from {self.where}"
        with explained(what, self._cache), self._fetching(artifact_id):
            if not size_problem(folder, files):  # another process fetched it
                return folder
            staging = self.staging.new()
            try:
                if folder.exists():
                    folder.rename(staging / "damaged")
                    shutil.rmtree(staging / "damaged")
                needed, free = sum(file.size_bytes for file in files), shutil.disk_usage(staging).free
                if needed > free:
                    raise StoreError(
                        Reason.FULL,
                        f"{what}: it has {needed:,} bytes, and {free:,} are free in {self._cache}; free some there, or"
                        " let XDG_CACHE_HOME name another folder",
                    )
                self._fetch(artifact_id, files, staging)
                (staging / FILE_NAME).write_bytes(manifest_json)
                sync_all(staging)
                folder.parent.mkdir(parents=True, exist_ok=True)
                staging.rename(folder)
            finally:
                self.staging.discard(staging)
        return folder

    @contextmanager
    def _fetching(self, artifact_id: str) -> Iterator[None]:
        """One process of this machine at a time fetches an artifact; the others find it in the cache afterwards."""
        (self._cache / "locks").mkdir(parents=True, exist_ok=True)
        with (self._cache / "locks" / artifact_id).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _fetch(self, artifact_id: str, files: Sequence[File], staging: Path) -> None:
        """Brings the files into the folder, and checks them."""
        for file in files:
            (staging / file.path).parent.mkdir(parents=True, exist_ok=True)
            (staging / file.path).touch()
        # Several requests at a time are several times as fast, for one large file too.
        ranges = [(file, start) for file in files for start in range(0, file.size_bytes, _RANGE_BYTES)]
        _each(lambda part: self._fetch_range(artifact_id, *part, staging), ranges)
        _each(lambda file: self._check(artifact_id, file, staging), files)

    def _fetch_range(self, artifact_id: str, file: File, start: int, staging: Path) -> None:
        content = self._range(artifact_id, file, start)
        with (staging / file.path).open("r+b") as opened:
            opened.seek(start)
            opened.write(content)

    def _check(self, artifact_id: str, file: File, staging: Path) -> None:
        if sha256_of(staging / file.path) != file.sha256:
            raise StoreError(
                Reason.DAMAGED,
                f"fetching artifact {artifact_id[:12]} from {self.where}: {file.path} is not what its manifest says"
                " (sha-256); delete the artifact and compile it again",
            )

    # Changing.

    def prepare(self, artifact_id: str, staging: Path, files: Sequence[File], manifest_json: bytes) -> None:
        for file in files:
            what = f"uploading {file.path} of artifact {artifact_id[:12]}"
            key = self._key(f"{ARTIFACTS}/{artifact_id}/{file.path}")
            with explained_s3(what, self.where):
                self._files().put_file(str(staging / file.path), f"{self._bucket}/{key}", chunksize=_PART_BYTES)

    def appear(self, artifact_id: str, staging: Path, manifest_json: bytes) -> None:
        self._write(f"{ARTIFACTS}/{artifact_id}/{FILE_NAME}", manifest_json, f"publishing artifact {artifact_id[:12]}")

    def abandon(self, artifact_id: str) -> None:
        what = f"removing what was uploaded of artifact {artifact_id[:12]}"
        found = self._entries(f"{ARTIFACTS}/{artifact_id}/", what)
        if f"{ARTIFACTS}/{artifact_id}/{FILE_NAME}" not in found:
            self._remove_all(list(found), what)

    def delete(self, artifact_id: str) -> None:
        what = f"deleting artifact {artifact_id[:12]}"
        self._call("delete_object", what, Key=self._key(f"{ARTIFACTS}/{artifact_id}/{FILE_NAME}"))
        self._remove_all(list(self._entries(f"{ARTIFACTS}/{artifact_id}/", what)), what)

    def notes(self, kind: str) -> dict[str, Note]:
        what = "reading the artifact store"
        entries = self._entries(f"{kind}/", what)
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            contents = pool.map(lambda key: self._read(key, what), entries)
        return {
            key.removeprefix(f"{kind}/").removesuffix(".json"): Note(content, changed_at)
            for (key, (_, changed_at)), content in zip(entries.items(), contents, strict=True)
            if content is not None  # removed just now
        }

    def note(self, kind: str, name: str) -> bytes | None:
        return self._read(f"{kind}/{name}.json", "reading the artifact store")

    def write_note(self, kind: str, name: str, content: bytes) -> None:
        self._write(f"{kind}/{name}.json", content, "writing to the artifact store")

    def renew_note(self, kind: str, name: str, content: bytes) -> None:
        self._write(f"{kind}/{name}.json", content, "renewing a lease")

    def remove_note(self, kind: str, name: str) -> None:
        self._call("delete_object", "writing to the artifact store", Key=self._key(f"{kind}/{name}.json"))

    def sweep(self, alive: set[str]) -> int:
        what, freed = "cleaning the artifact store", 0
        parts: dict[str, dict[str, int]] = {}
        for key, (size, _) in self._entries(f"{ARTIFACTS}/", what).items():
            one, _, path = key.removeprefix(f"{ARTIFACTS}/").partition("/")
            parts.setdefault(one, {})[path] = size
        for one, sizes in parts.items():
            if FILE_NAME not in sizes and one not in alive:
                self._remove_all([f"{ARTIFACTS}/{one}/{path}" for path in sizes], what)
                freed += sum(sizes.values())
        self._abort_uploads(alive, what)
        with explained(what, self._cache):
            freed += self.staging.sweep()
            cached = self._cache / ARTIFACTS
            for folder in list(cached.iterdir()) if cached.is_dir() else ():
                if folder.name not in alive and FILE_NAME not in parts.get(folder.name, {}):
                    freed += self._drop(folder)
        return freed

    def _abort_uploads(self, alive: set[str], what: str) -> None:
        """Ends uploads in parts whose processes died: S3 keeps, and charges for, their parts otherwise."""
        prefix = self._key(f"{ARTIFACTS}/")
        for upload in self._call("list_multipart_uploads", what, Prefix=prefix).get("Uploads", ()):
            if upload["Key"].removeprefix(prefix).partition("/")[0] not in alive:
                with contextlib.suppress(ObjectMissingError):  # it just ended
                    self._call("abort_multipart_upload", what, Key=upload["Key"], UploadId=upload["UploadId"])

    def _drop(self, folder: Path) -> int:
        size, rubbish = size_of(folder), self.staging.new()
        try:
            folder.rename(rubbish / folder.name)
        finally:
            self.staging.discard(rubbish)
        return size

    # Requests.

    def _files(self) -> Any:
        if self._opened is None:
            try:
                import s3fs
            except ImportError as error:
                raise StoreError(
                    Reason.UNAVAILABLE,
                    f"artifact store {self.where}: the package s3fs is not installed; pip install 'inkwell[s3]'",
                ) from error
            self._opened = s3fs.S3FileSystem(
                use_listings_cache=False,  # others write to the bucket too
                skip_instance_cache=True,
                config_kwargs={
                    "connect_timeout": _CONNECT_S,
                    "read_timeout": _READ_S,
                    "retries": {"mode": "standard", "total_max_attempts": _TRIES},
                },
            )
            self._opened.retries = _TRIES
        return self._opened

    def _key(self, name: str) -> str:
        return f"{self._prefix}{name}"

    def _call(self, method: str, what: str, **arguments: Any) -> Any:
        with explained_s3(what, self.where):
            return self._files().call_s3(method, Bucket=self._bucket, **arguments)

    def _read(self, name: str, what: str) -> bytes | None:
        try:
            with explained_s3(what, self.where):
                files = self._files()
                from fsspec.asyn import sync

                content: bytes = sync(files.loop, self._read_whole, name)
                return content
        except ObjectMissingError:
            return None

    async def _read_whole(self, name: str) -> bytes:
        # One request, where s3fs's own would ask for the size first.
        answer = await self._files()._call_s3("get_object", Bucket=self._bucket, Key=self._key(name))
        async with answer["Body"] as body:
            content: bytes = await body.read()
            return content

    def _write(self, name: str, content: bytes, what: str) -> None:
        self._call("put_object", what, Key=self._key(name), Body=content)

    def _entries(self, prefix: str, what: str) -> dict[str, tuple[int, float]]:
        """Objects whose names begin so: name -> bytes and time of the last change."""
        found: dict[str, tuple[int, float]] = {}
        more: dict[str, str] = {}
        while True:
            listed = self._call("list_objects_v2", what, Prefix=self._key(prefix), **more)
            for entry in listed.get("Contents", ()):
                name = entry["Key"].removeprefix(self._prefix)
                found[name] = (entry["Size"], entry["LastModified"].timestamp())
            if not listed.get("IsTruncated"):
                return found
            more = {"ContinuationToken": listed["NextContinuationToken"]}

    def _remove_all(self, names: list[str], what: str) -> None:
        for start in range(0, len(names), _DELETE_MOST):
            objects = [{"Key": self._key(name)} for name in names[start : start + _DELETE_MOST]]
            answer = self._call("delete_objects", what, Delete={"Objects": objects, "Quiet": True})
            if errors := answer.get("Errors"):
                raise StoreError(
                    Reason.DENIED, f"{what}: {self.where} refused: {errors[0].get('Code')} {errors[0].get('Key')}"
                )


def _date_of(answer: Any) -> float:
    """The server's clock, from the headers of an answer."""
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    return parsedate_to_datetime(date).timestamp() if date else time.time()


def _each(work: Callable[[_T], None], items: Iterable[_T]) -> None:
    """Does the work for all items, several at a time; after the first failure begins no further one."""
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        try:
            for done in as_completed([pool.submit(work, item) for item in items]):
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
