"""What a checkpoint is told by: the content of the files that matter, and nothing else."""

import hashlib
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.runtimes.artifacts import digests
from services.runtimes.artifacts.digests import digest_of

LONG_AGO = 1_600_000_000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "inkwell" / "checkpoint-digests.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoint = tmp_path / "checkpoint"
    for path, content in {
        "config.json": b"{}",
        "model.safetensors": bytes(1000),
        "tokenizer/vocab.json": b'{"a": 0}',
        "README.md": b"read me",
        "samples/01.png": b"png",
        "samples/labels.txt": b"01",
        ".cache/x.json": b"{}",
        "runs/events.json": b"{}",
        "checkpoint-100/model.safetensors": b"another state",
    }.items():
        (checkpoint / path).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / path).write_bytes(content)
    return checkpoint


def test_it_changes_with_what_the_model_is_made_of_only(folder: Path) -> None:
    digest = digest_of(folder)
    assert len(bytes.fromhex(digest)) == 32
    for path in (
        "README.md",
        "samples/02.png",
        "samples/labels.txt",
        ".cache/x.json",
        "runs/events.json",
        "checkpoint-100/model.safetensors",
    ):
        (folder / path).write_bytes(b"other")
        assert digest_of(folder) == digest, path
    for path in ("config.json", "model.safetensors", "tokenizer/vocab.json", "new.json"):
        before = (folder / path).read_bytes() if (folder / path).exists() else None
        (folder / path).write_bytes(b"other")
        assert digest_of(folder) != digest, path
        if before is None:
            (folder / path).unlink()
        else:
            (folder / path).write_bytes(before)
        assert digest_of(folder) == digest, path
    (folder / "config.json").rename(folder / "renamed.json")
    assert digest_of(folder) != digest


def test_a_copy_and_a_folder_of_links_have_the_same(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    links = tmp_path / "links"
    for file in folder.rglob("*"):
        if file.is_file():
            link = links / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    assert digest_of(copy) == digest_of(links) == digest_of(folder)


def test_what_was_hashed_is_not_read_again_until_it_changes(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A file's time of change cannot be set, so let it count as settled.
    monkeypatch.setattr(digests, "_SETTLED_NS", -1)
    for file in folder.rglob("*"):
        os.utime(file, (LONG_AGO, LONG_AGO))
    digest = digest_of(folder)
    read: list[str] = []
    original = digests._file_digest

    def noted(path: str, pool: ThreadPoolExecutor) -> str:
        read.append(os.path.basename(path))
        return original(path, pool)

    monkeypatch.setattr(digests, "_file_digest", noted)
    assert digest_of(folder) == digest
    assert read == []
    # The same size and, set back, the same time: its inode's time tells.
    (folder / "model.safetensors").write_bytes(bytes(999) + b"1")
    os.utime(folder / "model.safetensors", (LONG_AGO, LONG_AGO))
    assert digest_of(folder) != digest
    assert read == ["model.safetensors"]
    for broken in (b"", b"[]", b'{"x": 1}', b"\xff", b'{"x": [1]}'):
        cache.write_bytes(broken)
        (folder / "model.safetensors").write_bytes(bytes(1000))
        assert digest_of(folder) == digest
    assert digest_of(folder) == digest


def test_a_file_that_could_still_change_within_a_tick_is_not_remembered(folder: Path, cache: Path) -> None:
    digest_of(folder)
    assert not cache.exists()


def test_it_works_without_a_place_for_the_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_SETTLED_NS", -1)
    digest = digest_of(folder)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert digest_of(folder) == digest


def test_a_folder_without_a_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no files of a checkpoint"):
        digest_of(tmp_path)
    with pytest.raises(FileNotFoundError):
        digest_of(tmp_path / "not-there")


@given(st.integers(0, 5), st.integers(0, 64), st.data())
def test_every_byte_of_a_file_of_many_parts_counts(parts: int, rest: int, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "_PART_BYTES", 64)
        content = bytearray(hashlib.shake_128(bytes([parts, rest])).digest(64 * parts + rest))
        file = Path(name) / "model.safetensors"
        file.write_bytes(content)
        digest = digest_of(Path(name))
        if content:
            at = data.draw(st.integers(0, len(content) - 1))
            content[at] ^= 1
            file.write_bytes(content)
            assert digest_of(Path(name)) != digest
        file.write_bytes(bytes(content) + b"\0")
        assert digest_of(Path(name)) != digest
