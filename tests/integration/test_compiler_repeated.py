"""A compile of what is stored already, in a process as the service starts it: it imports no library of models."""

import json
import subprocess
import sys
from pathlib import Path

import msgspec

from services.compiler import work
from services.compiler.domain import CompileJob, CompileRequest
from services.compiler.recipe import recipe_of
from services.runtimes.artifacts.digests import digest_of
from services.runtimes.artifacts.store import open_store
from tests.support.artifacts import publish
from tests.support.compiled_trocr import EMBEDDED

# What a compile that has to be made imports, seconds each.
HEAVY = ("torch", "transformers", "diffusers", "onnx", "onnxruntime", "openvino", "nncf", "dbos", "sqlalchemy")
SCRIPT = f"""
import json, sys, tempfile
from pathlib import Path
import msgspec
from services.compiler.domain import CompileJob
from services.compiler.work import compile_job

job = msgspec.json.decode(sys.argv[1], type=CompileJob)
told = []
with tempfile.TemporaryDirectory() as folder:
    result = compile_job(job, Path(folder), told.append)
imported = [name for name in {HEAVY!r} if name in sys.modules]
print(json.dumps({{"id": result.artifact_id, "stages": [each.stage for each in told], "imported": imported}}))
"""


def test_what_is_stored_is_found_without_importing_what_makes_it(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "artifacts"))
    request = CompileRequest("handwriting-tiny", str(EMBEDDED), "openvino", "int8_weight_only")
    digest = digest_of(EMBEDDED)
    stored = publish(store, recipe=recipe_of(request, digest, "", work._versions(request.target)))
    job = CompileJob(request, store.location, str(store.staging()))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, msgspec.json.encode(job).decode()],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    told = json.loads(done.stdout)
    assert told == {"id": stored.id, "stages": ["fetching", "publishing"], "imported": []}
