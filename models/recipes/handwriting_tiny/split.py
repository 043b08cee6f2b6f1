"""Which writers are never trained on, and the texts of those who are."""

from __future__ import annotations

from pathlib import Path

HELD_OUT_WRITERS = ("7", "16", "25", "33")  # of the DHSD set


def training_texts(data: Path) -> list[str]:
    """Texts of the real training lines, for rendering them in fonts as well."""
    texts: list[str] = []
    for name, held_out in (("dhsd", HELD_OUT_WRITERS), ("peraire", ())):
        rows = (data / name / "labels.tsv").read_text(encoding="utf-8").splitlines()[1:]
        cells = [row.split("\t") for row in rows]
        texts += sorted({cell[1] for cell in cells if cell[2] not in held_out})
    return texts
