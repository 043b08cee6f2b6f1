"""What every store does, in a folder and in S3: what is published, found, read, held, chosen and collected."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from services.runtimes.artifacts.errors import Reason, StoreError
from services.runtimes.artifacts.manifest import FORMAT, Check, File, Requires, artifact_id, encode
from services.runtimes.artifacts.store import Store, Stored, default_location, open_store
from tests.support.artifacts import FILES, content_of, fill, manifest, publish
from tests.unit.runtimes.artifacts.conftest import Raw

# For what the place has no part in.
in_a_folder = pytest.mark.parametrize("raw", ["folder"], indirect=True)


def test_what_was_published_is_found_whole_under_the_digest_of_its_manifest(store: Store) -> None:
    stored = publish(store)
    folder = store.local_folder(stored.id)
    content = content_of(folder)
    assert artifact_id(content.pop("manifest.json")) == stored.id
    assert content == FILES
    assert stored.manifest.source_digest == "5" * 64
    assert {file.path: file.size_bytes for file in stored.manifest.files} == {
        path: len(content) for path, content in FILES.items()
    }
    assert stored.size_bytes == sum(map(len, FILES.values())) + len(stored.manifest_json)
    assert store.verify(stored.id) == []
    again = open_store(store.location)
    assert again.get(stored.id[:8].upper()) == again.find()[0] == stored


def test_nothing_is_left_of_the_staging_folder(store: Store) -> None:
    first = store.staging()
    publish(store)
    publish(store)
    with pytest.raises(StoreError):
        store.publish(fill(store.staging(), {"encoder.onnx": b""}), manifest(2))
    store.discard(first)
    store.collect()
    assert list(first.parent.iterdir()) == []


@in_a_folder
def test_a_folder_elsewhere_is_copied(store: Store, tmp_path: Path) -> None:
    elsewhere = fill(tmp_path / "elsewhere")
    stored = store.publish(elsewhere, manifest())
    assert store.verify(stored.id) == []
    assert content_of(elsewhere) == FILES


def test_two_publishes_of_one_recipe_are_one(store: Store) -> None:
    first = publish(store, 1)
    second = publish(store, 1, created_at="2027-01-01T00:00:00+00:00", content={**FILES, "encoder.onnx": b"other"})
    assert second == first
    assert store.find() == [first] == [store.find_recipe("recipe 1")]
    assert store.find_recipe("recipe 2") is None


def test_two_publishes_at_the_same_time_are_one(store: Store) -> None:
    both = threading.Barrier(4)

    def run(number: int) -> str:
        mine = open_store(store.location)
        staging = fill(mine.staging())
        both.wait()
        return mine.publish(staging, manifest(created_at=f"2026-11-24T10:00:0{number}Z")).id

    with ThreadPoolExecutor(4) as pool:
        ids = set(pool.map(run, range(4)))
    assert len(ids) == 1
    assert [stored.id for stored in store.find()] == list(ids)


@in_a_folder
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"checks": (Check("likeness", 20.0, 30.0, at_least=True),)}, "likeness"),
        ({"format": FORMAT + 1}, "format"),
        ({"recipe": ""}, "recipe"),
        ({"source_digest": ""}, "source_digest"),
        ({"created_at": "yesterday"}, "created_at"),
        ({"created_at": "2026-11-24T10:00:00+01:00"}, "created_at"),
        ({"model_folder": "models"}, "model_folder"),
        ({"graphs": (msgspec.structs.replace(manifest().graphs[0], file="../encoder.onnx"),)}, "encoder.onnx"),
        ({"files": (File("encoder.onnx", 3, "0" * 64),)}, "encoder.onnx: 20 bytes, should be 3"),
        ({"files": (File("encoder.onnx", 20, "0" * 64),)}, "encoder.onnx: its content has changed"),
    ],
)
def test_an_artifact_that_is_not_right_is_not_published(store: Store, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(StoreError, match=said) as raised:
        publish(store, **changes)
    assert raised.value.reason is Reason.INVALID
    assert store.find() == []


@in_a_folder
def test_a_link_out_of_the_artifact_is_not_published(store: Store, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    for target in (tmp_path / "secret", tmp_path):
        staging = fill(store.staging())
        (staging / "link").symlink_to(target)
        with pytest.raises(StoreError, match="link"):
            store.publish(staging, manifest())
    assert store.find() == []
    assert (tmp_path / "secret").exists()


@in_a_folder
@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "model/../../secret", "a//b", "", ".", "a\\b", "a\nb"])
def test_a_manifest_with_a_path_that_leads_out_is_not_believed(store: Store, raw: Raw, path: str) -> None:
    whole = manifest(files=(File("encoder.onnx", 0, ""), File("model/config.json", 0, ""), File(path, 0, "")))
    content = encode(whole)
    raw.write(f"artifacts/{artifact_id(content)}/manifest.json", content)
    with pytest.raises(StoreError, match="cannot be used") as raised:
        store.get(artifact_id(content))
    assert raised.value.reason is Reason.DAMAGED


@in_a_folder
def test_artifacts_are_found_by_what_they_are(store: Store) -> None:
    a = publish(store, 1)
    b = publish(store, 2, target="openvino")
    c = publish(store, 3, target="openvino", precision="int8_weight_only")
    d = publish(store, 4, kind="diffusion", model="emoji-tiny", source_digest="6" * 64)
    assert store.find() == [d, c, b, a]
    assert store.find(model="handwriting-tiny") == [c, b, a]
    assert store.find(target="openvino") == [c, b]
    assert store.find(target="openvino", precision="float32") == [b]
    assert store.find(source_digest="6" * 64) == store.find(kind="diffusion") == [d]
    assert store.find(model="other") == []
    assert open_store(store.location + "-not-there").find() == []


@in_a_folder
def test_pages_hold_still_while_artifacts_come_and_go(store: Store) -> None:
    stored = [publish(store, number) for number in range(7)]
    first = store.page(page_size=3)
    assert list(first.artifacts) == stored[:3:-1]
    publish(store, 8)
    store.delete(stored[4].id)  # the last of the page that was shown
    store.delete(stored[2].id)
    second = store.page(page_size=3, page_token=first.next_page_token)
    assert list(second.artifacts) == [stored[3], stored[1], stored[0]]
    assert second.next_page_token == ""
    assert store.page(page_size=7).next_page_token == store.page(page_size=6).next_page_token == ""


@in_a_folder
def test_artifacts_of_one_second_are_all_listed(store: Store) -> None:
    ids = {publish(store, number, created_at="2026-11-24T10:00:00Z").id for number in range(5)}
    seen, token = [], ""
    while True:
        page = store.page(page_size=2, page_token=token)
        seen += [stored.id for stored in page.artifacts]
        token = page.next_page_token
        if not token:
            break
    assert sorted(seen) == sorted(ids)


@in_a_folder
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"page_size": 0}, "page_size: 0; it has to be from 1 to 200"),
        ({"page_size": 201}, "page_size: 201"),
        ({"page_token": "x"}, "page_token"),
        ({"page_token": "bnVsbA=="}, "page_token"),
        ({"page_token": "é"}, "page_token"),
    ],
)
def test_a_page_that_cannot_be_is_refused(store: Store, options: dict[str, Any], said: str) -> None:
    with pytest.raises(StoreError, match=said) as raised:
        store.page(**options)
    assert raised.value.reason is Reason.INVALID


@in_a_folder
def test_a_page_token_belongs_to_its_filters(store: Store) -> None:
    for number in range(2):
        publish(store, number)
    token = store.page(page_size=1).next_page_token
    with pytest.raises(StoreError, match="other filters"):
        store.page(page_size=1, page_token=token, target="onnx")


@in_a_folder
def test_an_id_is_told_by_its_first_digits_when_they_are_enough(store: Store, raw: Raw) -> None:
    stored = publish(store)
    for wrong in ("", stored.id[:7], stored.id + "0", "g" * 64, "../" + stored.id):
        with pytest.raises(StoreError, match="8 or more") as raised:
            store.get(wrong)
        assert raised.value.reason is Reason.INVALID
    with pytest.raises(StoreError, match=f"no artifact {'0' * 64}") as raised:
        store.get("0" * 64)
    assert raised.value.reason is Reason.NOT_FOUND
    raw.write(f"artifacts/{stored.id[:8]}{'0' * 56}/manifest.json", b"{}")
    with pytest.raises(StoreError, match="more than one") as raised:
        store.get(stored.id[:8])
    assert raised.value.reason is Reason.AMBIGUOUS
    assert store.get(stored.id[:9]) == stored


def test_a_download_that_broke_off_goes_on_where_it_was(store: Store) -> None:
    content = os.urandom(3_000_001)
    stored = publish(store, content={**FILES, "encoder.onnx.data": content})
    beginning = next(store.read(stored.id, "encoder.onnx.data"))
    assert 0 < len(beginning) <= 1 << 20
    assert beginning + b"".join(store.read(stored.id, "encoder.onnx.data", len(beginning))) == content
    assert list(store.read(stored.id, "encoder.onnx.data", len(content))) == []
    assert b"".join(store.read(stored.id[:8], "manifest.json", 5)) == stored.manifest_json[5:]
    for offset in (-1, len(content) + 1):
        with pytest.raises(StoreError, match="offset") as raised:
            store.read(stored.id, "encoder.onnx.data", offset)
        assert raised.value.reason is Reason.INVALID
    for path in ("../../../lock", "model", "/etc/passwd", ""):
        with pytest.raises(StoreError, match="has no file") as raised:
            store.read(stored.id, path)
        assert raised.value.reason is Reason.NOT_FOUND


def test_what_use_chose_lasts_and_is_not_deleted(store: Store) -> None:
    first, second = publish(store, 1), publish(store, 2)
    names = ["handwriting-tiny", "owner/name", "..", "ß" * 100]
    for name in names:
        assert store.used(name) is None
        store.use(name, first.id[:8])
    store.use("other", second.id)
    again = open_store(store.location)
    assert [again.used(name) for name in names] == [first.id] * 4
    with pytest.raises(StoreError, match="chosen for model owner/name") as raised:
        again.delete(first.id)
    assert raised.value.reason is Reason.IN_USE
    assert [again.unuse(name) for name in names] == [True] * 4
    assert not again.unuse(names[0])
    assert list(again.users()) == [second.id]
    assert again.delete(first.id) == first.size_bytes
    assert again.find() == [second]
    with pytest.raises(StoreError, match="there is no artifact"):
        again.use("handwriting-tiny", first.id)
    assert again.used("handwriting-tiny") is None


def test_what_is_held_is_not_deleted(store: Store) -> None:
    stored = publish(store)
    other = open_store(store.location)
    with store.hold(stored.id[:10], "OCR service") as held, store.hold(stored.id, "diffusion service"):
        assert held == stored
        with pytest.raises(StoreError, match="OCR service on ") as raised:
            other.delete(stored.id)
        assert raised.value.reason is Reason.IN_USE
        assert other.collect(keep_newest=0).deleted == ()
    assert other.users() == {}
    assert other.collect(keep_newest=0).deleted == (stored,)
    with pytest.raises(StoreError, match="there is no artifact"), store.hold(stored.id, "OCR service"):
        pass


def test_a_lease_that_nobody_renews_ends(store: Store, raw: Raw) -> None:
    stored = publish(store)
    with store.hold(stored.id, "OCR service"):
        raw.age("leases/", 170)
        assert list(store.users()) == [stored.id]
        raw.age("leases/", 15)
        assert store.users() == {}
        assert open_store(store.location).collect(keep_newest=0).deleted == (stored,)
        assert raw.names("leases/") == []


def test_a_lease_is_renewed_as_long_as_it_is_held(raw: Raw) -> None:
    store = open_store(raw.location, lease_s=1.2)
    stored = publish(store)
    with store.hold(stored.id, "OCR service"):
        # Once by its age, once after it was taken for dead and removed.
        raw.age("leases/", 3600)
        until(lambda: stored.id in store.users())
        for lease in raw.names("leases/"):
            raw.remove(lease)
        until(lambda: stored.id in store.users())
    until(lambda: raw.names("leases/") == [])


def until(condition: Any) -> None:
    """Waits for something that another thread is about to do; pytest's own limit ends it if it never does."""
    while not condition():
        threading.Event().wait(0.01)


@in_a_folder
def test_collect_keeps_the_newest_of_each_kind_and_the_young(store: Store) -> None:
    old = [publish(store, number) for number in range(4)]
    other_target = publish(store, 4, target="openvino")
    other_precision = publish(store, 5, precision="float16")
    other_model = publish(store, 6, model="other")
    one_gpu = publish(store, 7, target="tensorrt", requires=Requires(hardware="cuda", compute_capability="8.0"))
    other_gpu = publish(store, 8, target="tensorrt", requires=Requires(hardware="cuda", compute_capability="9.0"))
    assert store.collect(keep_newest=1, older_than_s=3600).deleted == ()
    assert store.collect(keep_newest=2).deleted == (old[1], old[0])
    collected = store.collect()
    assert collected.deleted == (old[2],)
    assert collected.freed_bytes == old[2].size_bytes
    kept = {stored.id for stored in (old[3], other_target, other_precision, other_model, one_gpu, other_gpu)}
    assert {stored.id for stored in store.find()} == kept
    for options in ({"keep_newest": -1}, {"older_than_s": -1.0}):
        with pytest.raises(StoreError, match="0 or more"):
            store.collect(**options)


def test_notes_that_cannot_be_read_harm_nobody_else(store: Store, raw: Raw) -> None:
    stored, other = publish(store, 1), publish(store, 2)
    store.use("handwriting-tiny", stored.id)
    raw.write("used/handwriting-tiny.json", b"")
    raw.write(f"leases/{other.id}-0.json", b"")
    with pytest.raises(StoreError, match="model handwriting-tiny: .*choose again") as raised:
        store.used("handwriting-tiny")
    assert raised.value.reason is Reason.DAMAGED
    assert store.used("other") is None
    assert store.users() == {other.id: ["somebody unknown"]}
    assert store.collect(keep_newest=0).deleted == (stored,)
    store.use("handwriting-tiny", other.id)
    assert store.used("handwriting-tiny") == other.id


def test_collect_takes_nothing_that_is_younger_than_a_publish_under_way(
    store: Store, raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = type(store._place)
    old = publish(store, 1)
    raw.age("artifacts/", 10)
    collected: list[Stored] = []

    def prepare(self: Any, artifact_id: str, *arguments: Any) -> None:
        original(self, artifact_id, *arguments)
        if artifact_id != young.get("id"):
            other = open_store(store.location)
            monkeypatch.setattr(place, "prepare", original)
            young["id"] = publish(other, 2).id
            collected.extend(other.collect(keep_newest=0).deleted)

    young: dict[str, str] = {}
    original = place.prepare
    monkeypatch.setattr(place, "prepare", prepare)
    last = publish(store, 3)
    assert [stored.id for stored in collected] == [old.id]
    assert {stored.id for stored in store.collect(keep_newest=0).deleted} == {young["id"], last.id}


def test_collect_leaves_what_is_being_made(store: Store) -> None:
    staging = fill(store.staging())
    open_store(store.location).collect(keep_newest=0)
    stored = store.publish(staging, manifest())
    assert store.verify(stored.id) == []


@pytest.mark.parametrize("location", ["gs://bucket", "http://somewhere", "ftp://x/y"])
def test_a_location_of_another_kind_is_refused_with_what_would_do(location: str) -> None:
    with pytest.raises(StoreError, match="give a folder or s3://bucket/prefix"):
        open_store(location)


def test_artifacts_lie_in_the_users_data_folder_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert open_store().location == str(tmp_path / "data" / "inkwell" / "artifacts")
    for other in ("", "relative"):
        monkeypatch.setenv("XDG_DATA_HOME", other)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert default_location() == str(tmp_path / ".local" / "share" / "inkwell" / "artifacts")


def test_damage_is_told_and_never_served(store: Store, raw: Raw) -> None:
    stored, whole = publish(store, 1), publish(store, 2)
    file, manifest_file = (f"artifacts/{stored.id}/{name}" for name in ("encoder.onnx", "manifest.json"))
    raw.write(file, b"graph of the Encoder")
    assert [problem.partition(" (")[0] for problem in store.verify(stored.id)] == [
        "encoder.onnx: its content has changed"
    ]
    raw.write(file, b"graph")
    with pytest.raises(StoreError, match="encoder.onnx.* 5 bytes.* should have 20") as raised:
        store.local_folder(stored.id)
    assert raised.value.reason is Reason.DAMAGED
    raw.remove(file)
    assert "the file is gone" in store.verify(stored.id)[0]
    with pytest.raises(StoreError, match="encoder.onnx.* (gone|missing)"):
        store.local_folder(stored.id)
    # Its manifest, too: a process that has not read it yet sees it.
    raw.write(manifest_file, stored.manifest_json + b" ")
    fresh = open_store(store.location)
    with pytest.raises(StoreError, match="changed or damaged"):
        fresh.get(stored.id)
    assert fresh.find() == [whole]
    fresh.delete(stored.id)
    assert fresh.verify(whole.id) == []
    assert raw.names(f"artifacts/{stored.id}") == []
