"""`inkwell use MODEL@torch`, and what holds an artifact: a compiler, an OCR service and the store that they share."""

from pathlib import Path

import pytest

import inkwell
from services.ocr import __main__ as ocr
from services.ocr.settings import Settings as OcrSettings
from services.runtimes.artifacts.store import open_store
from tests.integration.test_ocr import png
from tests.support import compiler_service
from tests.support.compiled_trocr import compiled, publish, tied


async def test_use_torch_holds_until_auto_and_a_service_that_stops_lets_go(tmp_path: Path) -> None:
    made = compiled(tied)
    store = open_store(str(tmp_path / "artifacts"))
    # Measured to be faster than torch, so that nothing but the choice keeps a service from it.
    stored = publish(store, made.folder, made.made, "onnxruntime", speed=9.0)
    models = {"tiny": str(made.folder)}
    async with compiler_service.serving(compiler_service.settings(tmp_path, models=models)) as client:
        server = ocr.build(OcrSettings(port=0, models=models, artifact_store=store.location, threads=1))
        await server.start()
        try:
            await server.wait_ready()
            async with inkwell.AsyncClient(f"127.0.0.1:{server.port}") as reader:
                assert (await reader.models())[0].runtime == "onnxruntime"
                line = png(seed=3)
                text = (await reader.read(line)).text

                assert await client.use_artifact("tiny", "torch") is None
                await reader.load_model("tiny")
                assert (await reader.models())[0].runtime == "torch"
                assert (await reader.read(line)).text == text
                # Neither chosen nor run any more.
                assert not (await client.artifact(stored.id)).in_use
                await reader.unload_model("tiny")
                await reader.load_model("tiny")
                assert (await reader.models())[0].runtime == "torch"

                await client.use_artifact("tiny", "auto")
                await reader.load_model("tiny")
                assert (await reader.models())[0].runtime == "onnxruntime"
                with pytest.raises(inkwell.FailedPrecondition, match="OCR service, model tiny"):
                    await client.delete_artifact(stored.id)
        finally:
            await server.stop(0)
        # At once, though a lease of a service that was killed would last for minutes.
        assert await client.delete_artifact(stored.id) == stored.size_bytes
