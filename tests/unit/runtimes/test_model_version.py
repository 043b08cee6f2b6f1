"""The version of a checkpoint: the same for the same contents anywhere, another for any trained change."""

from pathlib import Path

from services.runtimes import model_version

SIZE = 3 << 20


def checkpoint(folder: Path, weights: bytes) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_it_follows_the_contents_and_not_the_place(tmp_path: Path) -> None:
    weights = bytes(range(256)) * (SIZE // 256)
    one = checkpoint(tmp_path / "one", weights)
    version = model_version.of_checkpoint(one)
    assert len(version) == 12
    assert model_version.of_checkpoint(checkpoint(tmp_path / "two", weights)) == version
    (one / "README.md").write_text("read me")
    assert model_version.of_checkpoint(one) == version
    (one / "config.json").write_text("[]")
    assert model_version.of_checkpoint(one) != version
    assert model_version.of_checkpoint(one / "model.safetensors") != version


def test_training_changes_it_wherever_it_looks(tmp_path: Path) -> None:
    weights = bytearray(SIZE)
    version = model_version.of_checkpoint(checkpoint(tmp_path / "before", bytes(weights)))
    for start in range(0, SIZE, 64):  # a number in every sixteenth place
        weights[start] = 1
    assert model_version.of_checkpoint(checkpoint(tmp_path / "after", bytes(weights))) != version
    # And the ends, which appended or cut data changes.
    for place in (0, SIZE - 1):
        changed = bytearray(SIZE)
        changed[place] = 1
        assert model_version.of_checkpoint(checkpoint(tmp_path / f"at-{place}", bytes(changed))) != version


def test_an_artifact_is_its_own_version() -> None:
    assert model_version.of_artifact("0123456789abcdef") == "0123456789ab"
    assert model_version.of_artifact("") == ""
