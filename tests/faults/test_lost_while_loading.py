"""The engine is killed while it loads a model: the call that asked ends retryable, and the service comes back."""

import os
import signal
from pathlib import Path

import grpc
import pytest

from inkwell.common.v1 import common_pb2
from inkwell.ocr.v1 import ocr_pb2, ocr_pb2_grpc
from services import local
from services.ocr.__main__ import build
from services.ocr.settings import Settings
from tests.support import tiny_trocr


async def test_a_kill_while_loading_is_recovered_from(tmp_path: Path) -> None:
    tiny_trocr.save(tmp_path / "tiny", tiny_trocr.build())
    slow = tmp_path / "slow"
    tiny_trocr.save(slow, tiny_trocr.build(seed=1))
    # Looking at this file blocks until somebody writes to it: the load is under way for as long as the test wants.
    weights = (slow / "model.safetensors").read_bytes()
    models = {"tiny": str(tmp_path / "tiny"), "slow": str(slow)}
    server = build(Settings(port=0, models=models, load_at_start=["tiny"], threads=1, read_documents=False))
    await server.start()
    try:
        await server.wait_ready()
        (slow / "model.safetensors").unlink()
        os.mkfifo(slow / "model.safetensors")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = ocr_pb2_grpc.OcrServiceStub(channel)
            loading = stub.LoadModel(ocr_pb2.LoadModelRequest(name="slow"))
            assert (await loading.read()).progress.stage == ocr_pb2.LOAD_STAGE_WAITING
            listed = (await stub.ListModels(ocr_pb2.ListModelsRequest())).models
            assert {m.name: m.state for m in listed}["slow"] == common_pb2.MODEL_STATE_LOADING
            # Others are served meanwhile.
            sample = sorted(local.SAMPLES.glob("*.png"))[0].read_bytes()
            request = ocr_pb2.RecognizeRequest(image=common_pb2.Image(content=sample))
            assert (await stub.Recognize(request)).recognition.model == "tiny"

            assert server.host is not None
            assert server.host.pid is not None
            os.kill(server.host.pid, signal.SIGKILL)
            with pytest.raises(grpc.aio.AioRpcError) as lost:
                await loading.read()
            assert lost.value.code() == grpc.StatusCode.UNAVAILABLE
            (slow / "model.safetensors").unlink()
            (slow / "model.safetensors").write_bytes(weights)
            await server.host.wait_ready()
            assert (await stub.Recognize(request)).recognition.model == "tiny"
            request.model = "slow"
            assert (await stub.Recognize(request)).recognition.model == "slow"
    finally:
        await server.stop(0)
