"""One compile of `make compile-all`: its progress is shown, and its row says what came of it."""

import json
from pathlib import Path

from services.compiler import work
from services.compiler.compile_all import compile_one, table
from services.compiler.domain import CompileRequest
from services.compiler.recipe import recipe_of
from services.runtimes.artifacts.digests import digest_of
from services.runtimes.artifacts.store import open_store
from tests.support.artifacts import publish
from tests.support.compiled_trocr import EMBEDDED


def test_the_stages_are_shown_and_the_artifact_is_found(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    request = CompileRequest("m", str(EMBEDDED), "onnx", "int8_dynamic")
    stored = publish(store, recipe=recipe_of(request, digest_of(EMBEDDED), "", work._versions("onnx")))
    shown: list[str] = []
    row = compile_one("m", str(EMBEDDED), "onnx", "int8_dynamic", store.location, shown.append)
    assert shown == [f"1/8 fetching: {EMBEDDED}", f"8/8 publishing: it is there already: {stored.id[:12]}"]
    assert row.stored is not None
    assert (row.stored.id, row.error) == (stored.id, "")


def test_what_failed_is_in_the_table_with_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    shown: list[str] = []
    row = compile_one("bert", str(tmp_path / "bert"), "openvino", "float32", str(tmp_path / "store"), shown.append)
    assert shown == [f"1/8 fetching: {tmp_path / 'bert'}"]
    assert row.stored is None
    assert "no TrOCR, diffusers or ControlNet folder" in row.error
    assert "no TrOCR, diffusers or ControlNet folder" in table([row])
