from pathlib import Path

import pytest
from transformers import VisionEncoderDecoderModel

from services.ocr.engine.main import OcrEngine, create_engine
from services.ocr.settings import Settings
from tests.support import tiny_trocr
from tests.support.reading import lane_in


@pytest.fixture(scope="session")
def tiny_model() -> VisionEncoderDecoderModel:
    return tiny_trocr.build()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: VisionEncoderDecoderModel) -> Path:
    return tiny_trocr.save(tmp_path_factory.mktemp("tiny-trocr"), tiny_model)


@pytest.fixture(scope="session")
def shared_engine(tiny_folder: Path) -> OcrEngine:
    return create_engine(Settings(models={"tiny": str(tiny_folder)}, max_rows=32, threads=1).model_dump_json())


@pytest.fixture
def engine(shared_engine: OcrEngine) -> OcrEngine:
    """The session's engine with one model named "tiny"; every test leaves it empty."""
    assert not shared_engine.busy
    assert lane_in(shared_engine).rows_in_use == 0
    return shared_engine
