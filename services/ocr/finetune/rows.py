"""The labelled lines that training starts from: what they are, whether they can be used, and who is held out."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.kit.faults import Fault
from services.kit.images import Limits
from services.ocr import images
from services.ocr.evaluate import BadFolder, read_labels

DEFAULT_LIMITS = Limits(max_bytes=20 * 2**20, max_pixels=50_000_000, min_side=4)


@dataclass(frozen=True)
class Row:
    """One labelled line. `place` names it for people, `name` is stable between machines and decides splits."""

    place: str
    name: str
    text: str
    writer: str  # empty if unknown
    read: Callable[[], bytes]  # the encoded image
    stamp: str  # changes when the image does


@dataclass(frozen=True)
class Source:
    """Lines that came from one place, and the share of every batch they get (None: in proportion to their number)."""

    name: str
    rows: Sequence[Row]
    share: float | None = None


@dataclass(frozen=True)
class DatasetColumns:
    """Names of the columns of a Hugging Face dataset."""

    split: str = "train"
    image: str = "image"
    text: str = "text"
    writer: str = "writer"


@dataclass
class Split:
    """Sources to train on, and the rows that are only read to choose among checkpoints."""

    train: list[Source]
    validation: list[Row]
    validation_writers: list[str] = field(default_factory=list)


def parse_source(text: str) -> tuple[str, float | None]:
    """ "DIR" or "DIR=0.3" to the place and its share; raises ValueError for a share that is none."""
    place, equals, share = text.rpartition("=")
    if not equals:
        return text, None
    try:
        value = float(share)
    except ValueError:
        return text, None
    if not 0 < value <= 1:
        raise ValueError(f"{text}: a share is more than 0 and at most 1")
    return place, value


def read_folder(folder: Path, share: float | None = None, limits: Limits = DEFAULT_LIMITS) -> Source:
    """Lines of a folder with labels.tsv; raises BadFolder listing every bad row by its line number."""
    rows = []
    for label in read_labels(folder, limits):
        status = label.path.stat()
        stamp = f"{status.st_size}:{status.st_mtime_ns}"
        rows.append(Row(str(label.path), label.file, label.text, label.writer, label.path.read_bytes, stamp))
    return Source(str(folder), rows, share)


def read_dataset(
    place: str, columns: DatasetColumns, share: float | None = None, limits: Limits = DEFAULT_LIMITS
) -> Source:
    """Lines of a Hugging Face dataset: a folder of `save_to_disk`, a parquet file or folder, or owner/name@revision.

    Raises BadFolder for a missing library, place, split or column, and for every bad row by its number (from 0).
    """
    table = _open_dataset(place, columns)
    rows: list[Row] = []
    problems: list[str] = []
    texts = table[columns.text]
    writers = table[columns.writer] if columns.writer in table.column_names else None
    for number, text in enumerate(texts):
        where = f"{place}[{columns.split}]:{number}"
        read = _image_reader(table, columns.image, number)
        problem = "its text is empty" if not isinstance(text, str) or not text.strip() else _image_problem(read, limits)
        if problem:
            problems.append(f"{where}: {problem}")
            continue
        writer = "" if writers is None or writers[number] is None else str(writers[number])
        stamp = hashlib.sha256(read()).hexdigest()[:16]
        rows.append(Row(where, f"{columns.split}/{number}", text, writer, read, stamp))
    if not rows and not problems:
        problems.append(f"{place}: it has no rows")
    if problems:
        raise BadFolder(problems)
    return Source(place, rows, share)


def _open_dataset(place: str, columns: DatasetColumns) -> Any:
    try:
        import datasets
    except ImportError:
        raise BadFolder(["reading a dataset needs the library `datasets`: pip install 'inkwell[finetune]'"]) from None
    path = Path(place).expanduser()
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            found: Any = datasets.load_from_disk(str(path))
        elif path.suffix == ".parquet" and path.is_file():
            found = datasets.load_dataset("parquet", data_files=str(path))
        elif path.is_dir() and any(path.glob("**/*.parquet")):
            found = datasets.load_dataset("parquet", data_dir=str(path))
        elif not path.exists() and place.count("/") == 1 and "@" in place:
            name, _, revision = place.partition("@")
            found = datasets.load_dataset(name, revision=revision)
        else:
            raise BadFolder(
                [f"{place}: neither a folder of save_to_disk, nor parquet, nor a hub dataset as owner/name@revision"]
            )
    except BadFolder:
        raise
    except Exception as error:  # noqa: BLE001 - the library raises whatever it meets
        raise BadFolder([f"{place}: cannot be opened: {error}"]) from None
    if isinstance(found, datasets.DatasetDict):
        if columns.split not in found:
            raise BadFolder([f"{place}: no split {columns.split!r}; it has {', '.join(map(str, found))}"])
        found = found[columns.split]
    missing = [name for name in (columns.image, columns.text) if name not in found.column_names]
    if missing:
        raise BadFolder([f"{place}: no column {', '.join(missing)}; it has {', '.join(found.column_names)}"])
    if isinstance(found.features[columns.image], datasets.Image):
        found = found.cast_column(columns.image, datasets.Image(decode=False))
    return found


def _image_reader(table: Any, column: str, number: int) -> Callable[[], bytes]:
    def read() -> bytes:
        value = table[number][column]
        if isinstance(value, dict):
            content: bytes = value["bytes"] if value.get("bytes") is not None else Path(value["path"]).read_bytes()
            return content
        if isinstance(value, bytes):
            return value
        raise OSError(f"column {column!r} holds {type(value).__name__}, not images")

    return read


def _image_problem(read: Callable[[], bytes], limits: Limits) -> str | None:
    try:
        images.decode(read(), limits)
    except OSError as error:
        return str(error.strerror or error)
    except Fault as fault:
        return fault.data.fields[0].description
    return None


def split(sources: Sequence[Source], *, share: float, seed: int, writers: Sequence[str] = ()) -> Split:
    """Hold out about `share` of the rows: whole writers where they are known, else by a hash of each row's name.

    With `writers` exactly those are held out. Rows without a writer in data that has writers stay in training. The
    same rows are held out on every machine; the hash decides, and `seed` changes it. Raises BadFolder for a writer who
    is not there, and if nothing would be left to train on.
    """
    rows = [row for source in sources for row in source.rows]
    known = sorted({row.writer for row in rows if row.writer})
    chosen: list[str] = []
    if writers:
        missing = sorted(set(writers) - set(known))
        if missing:
            raise BadFolder([f"no row is by writer {', '.join(missing)}; the writers are {', '.join(known) or 'none'}"])
        chosen = list(writers)
        held = {id(row) for row in rows if row.writer in set(chosen)}
    elif share <= 0:
        held = set()
    elif len(known) >= 3:
        wanted = share * len(rows)
        count = 0
        for writer in sorted(known, key=lambda name: _hash(f"{seed}:{name}")):
            mine = sum(row.writer == writer for row in rows)
            if chosen and abs(count + mine - wanted) >= abs(count - wanted):
                continue
            chosen.append(writer)
            count += mine
            if count >= wanted:
                break
        held = {id(row) for row in rows if row.writer in set(chosen)}
    else:
        ordered = sorted(rows, key=lambda row: _hash(f"{seed}:{row.name}"))
        held = {id(row) for row in ordered[: min(len(rows) - 1, math.ceil(share * len(rows)))]}
    validation = [row for row in rows if id(row) in held]
    train = [Source(s.name, [row for row in s.rows if id(row) not in held], s.share) for s in sources]
    train = [source for source in train if source.rows]
    if not train:
        raise BadFolder(["nothing is left to train on: all rows are held out"])
    return Split(train, validation, sorted(chosen))


def sample(rows: Sequence[Row], most: int, seed: int) -> list[Row]:
    """At most so many of the rows (0: all), the same ones on every machine."""
    return sorted(rows, key=lambda row: _hash(f"{seed}:{row.name}"))[: most or None]


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
