"""A compile that is calibrated and judged on lines of the caller's own."""

import shutil
from pathlib import Path

import pytest

from services.compiler.domain import CompileJob, CompileRequest
from services.compiler.quality import lines
from services.compiler.work import compile_job
from services.kit.faults import Fault
from services.runtimes.artifacts.digests import digest_of_all
from services.runtimes.artifacts.store import open_store
from tests.support import compiler_service


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight labelled lines."""
    place = tmp_path / "lines"
    place.mkdir()
    rows = ["file\ttext"]
    for number, line in enumerate(lines.rendered(8, seed=3)):
        line.image.save(place / f"{number}.png")
        rows.append(f"{number}.png\t{line.text}")
    (place / "labels.tsv").write_text("\n".join(rows) + "\n")
    return place


def test_it_is_judged_by_them_and_stored_as_calibrated_on_them(folder: Path, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "artifacts"))
    source = compiler_service.tiny_model(tmp_path / "tiny")

    def compiled() -> str:
        request = CompileRequest("tiny", source, "onnx", "float32", calibration_folder=str(folder))
        work = tmp_path / "work"
        work.mkdir()
        try:
            return compile_job(
                CompileJob(request, store.location, str(store.staging())), work, lambda _: None
            ).artifact_id
        finally:
            shutil.rmtree(work)

    first = compiled()
    # Of every four lines one is for calibrating.
    assert store.get(first).manifest.figure("lines read") == 6
    assert compiled() == first
    for name in (folder / "labels.tsv", folder / "0.png", folder):
        if name.is_dir():
            shutil.rmtree(name)
        else:
            name.unlink()
        with pytest.raises(Fault) as refused:
            compiled()
        assert refused.value.data.reason == "CALIBRATION_UNUSABLE"
        assert str(folder) in refused.value.data.message


def test_every_file_of_them_counts(folder: Path) -> None:
    digests = {digest_of_all(folder)}
    (folder / "labels.tsv").write_text("file\ttext\n0.png\tother\n")
    digests.add(digest_of_all(folder))
    (folder / "7.png").write_bytes((folder / "6.png").read_bytes())
    digests.add(digest_of_all(folder))
    (folder / "page").mkdir()
    (folder / "page" / "8.png").write_bytes(b"")
    digests.add(digest_of_all(folder))
    assert len(digests) == 4
