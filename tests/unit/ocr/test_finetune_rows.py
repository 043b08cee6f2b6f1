"""What fine-tuning accepts as data, what it says of the rest, and whom it holds out."""

from pathlib import Path

import datasets
import pytest

from services.ocr.evaluate import BadFolder
from services.ocr.finetune.rows import DatasetColumns, parse_source, read_dataset, read_folder, split
from tests.support.teaching import write_lines


def test_every_bad_row_is_named_by_its_line(tmp_path: Path) -> None:
    folder = write_lines(tmp_path, [("ab", "1"), ("cd", "1"), ("ef", "2")])
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with (folder / "labels.tsv").open("a", encoding="utf-8") as labels:
        labels.write("gone.png\tgh\t2\nbroken.png\tij\t2\n0.png\t\t2\n0.png\tkl\n")
    with pytest.raises(BadFolder) as caught:
        read_folder(folder)
    problems = caught.value.problems
    assert [problem.split("labels.tsv:")[1].split(":")[0] for problem in problems] == ["5", "6", "7", "8"]
    assert "gone.png" in problems[0]
    assert "No such file" in problems[0]
    assert "broken.png" in problems[1]
    assert "empty" in problems[2]
    assert "2 columns where the header has 3" in problems[3]


def test_writers_are_read_and_may_be_missing(tmp_path: Path) -> None:
    with_writers = read_folder(write_lines(tmp_path / "one", [("ab", "Ann"), ("cd", "Bob")]))
    assert [row.writer for row in with_writers.rows] == ["Ann", "Bob"]
    without = read_folder(write_lines(tmp_path / "two", [("ab", "")], header="file\ttext"))
    assert [row.writer for row in without.rows] == [""]


def test_whole_writers_are_held_out(tmp_path: Path) -> None:
    rows = [(text, writer) for writer in "ABCDEFGHIJ" for text in ("ab", "cd", "ef")]
    source = read_folder(write_lines(tmp_path, rows))
    parts = split([source], share=0.2, seed=0)
    trained = {row.writer for part in parts.train for row in part.rows}
    held = {row.writer for row in parts.validation}
    assert len(held) == 2
    assert not trained & held
    assert sum(len(part.rows) for part in parts.train) + len(parts.validation) == len(rows)
    assert parts.validation_writers == sorted(held)
    other = split([source], share=0.2, seed=1)
    assert {row.writer for row in other.validation} != held


def test_named_writers_are_held_out_and_unknown_ones_refused(tmp_path: Path) -> None:
    source = read_folder(write_lines(tmp_path, [("ab", "A"), ("cd", "B"), ("ef", "B")]))
    parts = split([source], share=0.1, seed=0, writers=["B"])
    assert [row.text for part in parts.train for row in part.rows] == ["ab"]
    with pytest.raises(BadFolder, match=r"no row is by writer Z; the writers are A, B"):
        split([source], share=0.1, seed=0, writers=["Z"])
    with pytest.raises(BadFolder, match="nothing is left"):
        split([source], share=0.1, seed=0, writers=["A", "B"])


def test_without_writers_a_hash_decides_whatever_the_order(tmp_path: Path) -> None:
    source = read_folder(write_lines(tmp_path, [(text, "") for text in ("ab", "cd", "ef", "gh") * 5]))
    names = {row.name for row in split([source], share=0.2, seed=3).validation}
    assert len(names) == 4
    backwards = type(source)(source.name, source.rows[::-1])
    assert {row.name for row in split([backwards], share=0.2, seed=3).validation} == names


def test_a_share_stands_behind_the_folder() -> None:
    assert parse_source("some/lines") == ("some/lines", None)
    assert parse_source("some/lines=0.25") == ("some/lines", 0.25)
    assert parse_source("some/a=b") == ("some/a=b", None)
    with pytest.raises(ValueError, match="a share is more than 0 and at most 1"):
        parse_source("some/lines=1.5")


@pytest.fixture
def dataset(tmp_path: Path) -> datasets.Dataset:
    folder = write_lines(tmp_path / "lines", [("ab", "A"), ("cd", "B"), ("ef", "B")])
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "writer": datasets.Value("string")}
    )
    rows = {
        "image": [str(folder / f"{number}.png") for number in range(3)],
        "text": ["ab", "cd", "ef"],
        "writer": ["A", "B", "B"],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def test_a_saved_dataset_and_a_parquet_file_hold_the_same_lines(dataset: datasets.Dataset, tmp_path: Path) -> None:
    folder = read_folder(tmp_path / "lines")
    datasets.DatasetDict({"train": dataset}).save_to_disk(str(tmp_path / "saved"))
    dataset.cast_column("image", datasets.Image(decode=False)).map(
        lambda row: {"image": {"bytes": Path(row["image"]["path"]).read_bytes(), "path": None}}
    ).to_parquet(str(tmp_path / "lines.parquet"))
    for place in ("saved", "lines.parquet"):
        source = read_dataset(str(tmp_path / place), DatasetColumns())
        assert [(row.text, row.writer) for row in source.rows] == [("ab", "A"), ("cd", "B"), ("ef", "B")]
        assert [row.read() for row in source.rows] == [row.read() for row in folder.rows]


def test_what_is_wrong_with_a_dataset_is_said(dataset: datasets.Dataset, tmp_path: Path) -> None:
    datasets.DatasetDict({"train": dataset}).save_to_disk(str(tmp_path / "saved"))
    place = str(tmp_path / "saved")
    with pytest.raises(BadFolder, match=r"no split 'test'; it has train"):
        read_dataset(place, DatasetColumns(split="test"))
    with pytest.raises(BadFolder, match=r"no column words; it has image, text, writer"):
        read_dataset(place, DatasetColumns(text="words"))
    with pytest.raises(BadFolder, match="neither a folder of save_to_disk, nor parquet"):
        read_dataset(str(tmp_path / "nowhere"), DatasetColumns())
    emptied = dataset.map(lambda row, number: {"text": "" if number == 1 else row["text"]}, with_indices=True)
    emptied.save_to_disk(str(tmp_path / "emptied"))
    with pytest.raises(BadFolder) as caught:
        read_dataset(str(tmp_path / "emptied"), DatasetColumns())
    assert caught.value.problems == [f"{tmp_path / 'emptied'}[train]:1: its text is empty"]
