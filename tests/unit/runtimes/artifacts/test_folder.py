"""What only a store in a folder can come to: rights, links, no space."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.runtimes.artifacts.errors import Reason, StoreError
from services.runtimes.artifacts.store import Store, open_store
from tests.support.artifacts import FILES, fill, manifest, publish, without_rights


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def test_a_relative_location_and_a_home_are_what_they_say(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = publish(store)
    monkeypatch.setenv("HOME", str(tmp_path))
    for location in (os.path.relpath(store.location), "~/store", store.location + "/"):
        assert open_store(location).find() == [stored]


def test_a_link_that_was_put_into_an_artifact_is_not_followed(store: Store, tmp_path: Path) -> None:
    stored = publish(store)
    file = store.local_folder(stored.id) / "encoder.onnx"
    (tmp_path / "secret").write_bytes(bytes(20))
    file.unlink()
    file.symlink_to(tmp_path / "secret")
    with pytest.raises(StoreError, match="link"):
        next(store.read(stored.id, "encoder.onnx"))
    assert "link" in store.verify(stored.id)[0]


def test_files_that_only_their_writer_may_read_are_opened_to_the_others(store: Store) -> None:
    staging = fill(store.staging())
    (staging / "encoder.onnx").chmod(0o600)
    folder = store.local_folder(store.publish(staging, manifest()).id)
    assert (folder / "encoder.onnx").stat().st_mode == (folder / "manifest.json").stat().st_mode


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A folder that everybody may enter, as pytest's own is not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_store_that_may_not_be_written_to_is_served_from(open_to_all: Path, caplog: Any) -> None:
    root = open_to_all / "store"
    store = open_store(str(root))
    stored = publish(store)
    store.use("handwriting-tiny", stored.id)
    (root / ".lock").unlink()
    for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
        folder.chmod(0o555)
    with without_rights():
        reader = open_store(str(root))
        assert reader.find() == [stored]
        assert reader.used("handwriting-tiny") == stored.id
        assert reader.verify(stored.id) == []
        with reader.hold(stored.id, "OCR service"):
            assert (reader.local_folder(stored.id) / "encoder.onnx").read_bytes() == FILES["encoder.onnx"]
        assert "without a lease" in caplog.text
        for attempt in (
            lambda: reader.staging(),
            lambda: reader.use("handwriting-tiny", stored.id),
            lambda: reader.delete(stored.id),
            lambda: reader.collect(),
        ):
            with pytest.raises(StoreError, match=f"{root}.*give the service's user the right") as raised:
                attempt()
            assert raised.value.reason is Reason.DENIED
    for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
        folder.chmod(0o755)
    assert store.verify(stored.id) == []


def fill_up(folder: Path) -> Path:
    """A file that takes all the space there is."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as opened, contextlib.suppress(OSError):
        while opened.write(bytes(4096)):
            pass
    return filler


def test_a_full_disk_is_told_and_harms_nothing(small_disk: Path, tmp_path: Path, caplog: Any) -> None:
    store = open_store(str(small_disk / "store"))
    earlier = publish(store, 0)
    # While the files are copied from another file system.
    elsewhere = fill(tmp_path / "elsewhere", {**FILES, "encoder.onnx.data": bytes(300_000)})
    with pytest.raises(
        StoreError, match=f"no space is left in {small_disk}.*bytes are free.*delete artifacts"
    ) as raised:
        store.publish(elsewhere, manifest(1))
    assert raised.value.reason is Reason.FULL
    # While the last file, the manifest, is written.
    staging = fill(store.staging())
    filler = fill_up(small_disk)
    with pytest.raises(StoreError, match="no space is left") as raised:
        store.publish(staging, manifest(1))
    assert raised.value.reason is Reason.FULL
    assert list((small_disk / "store" / "staging").iterdir()) == []
    # It can still be served from, and freed.
    fill_up(small_disk)
    with store.hold(earlier.id, "OCR service"):
        assert (store.local_folder(earlier.id) / "encoder.onnx").read_bytes() == FILES["encoder.onnx"]
    assert "without a lease" in caplog.text
    assert store.find() == [earlier]
    assert store.verify(earlier.id) == []
    filler.unlink()
    assert store.verify(publish(store, 1).id) == []


def test_a_limit_on_the_size_of_files_is_told(store: Store, tmp_path: Path) -> None:
    elsewhere = fill(tmp_path / "elsewhere", {**FILES, "encoder.onnx.data": bytes(2_000_000)})
    code = (
        "import resource, sys; from pathlib import Path; from tests.support.artifacts import manifest\n"
        "from services.runtimes.artifacts.store import open_store\n"
        "from services.runtimes.artifacts.errors import StoreError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "try: open_store(sys.argv[1]).publish(Path(sys.argv[2]), manifest())\n"
        "except StoreError as error: print(error.reason.value, error)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, store.location, str(elsewhere)], capture_output=True, text=True, check=True
    )
    assert told.stdout.startswith("full copying the new artifact: a file in ")
    assert "raise the limit" in told.stdout
    assert list((Path(store.location) / "staging").iterdir()) == []
    assert store.find() == []
