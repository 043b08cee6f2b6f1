"""Which paths are routed, and as what."""

import pytest

from services.gateway import methods


@pytest.mark.parametrize(
    ("path", "service", "streams"),
    [
        ("/inkwell.ocr.v1.OcrService/Recognize", "ocr", (False, False)),
        ("/inkwell.ocr.v1.OcrService/StreamRecognize", "ocr", (False, True)),
        ("/inkwell.ocr.v1.OcrService/BatchRecognize", "ocr", (True, True)),
        ("/inkwell.ocr.v1.OcrService/ReadDocument", "ocr", (False, True)),
        ("/inkwell.ocr.v1.OcrService/Embed", "ocr", (False, False)),
        ("/inkwell.ocr.v1.OcrService/LoadModel", "ocr", (False, True)),
        ("/inkwell.ocr.v1.OcrService/UnloadModel", "ocr", (False, False)),
        ("/inkwell.diffusion.v1.DiffusionService/Generate", "diffusion", (False, True)),
        ("/inkwell.diffusion.v1.DiffusionService/ListSchedulers", "diffusion", (False, False)),
        ("/inkwell.ocr.v1.OcrService/OfTomorrow", "ocr", (True, True)),
    ],
)
def test_routed(path: str, service: str, streams: tuple[bool, bool]) -> None:
    method = methods.find(path)
    assert method is not None
    assert (method.path, method.service) == (path, service)
    assert (method.request_streaming, method.response_streaming) == streams


@pytest.mark.parametrize(
    "path", ["/inkwell.ocr.v2.OcrService/Recognize", "/OcrService/Recognize", "/inkwell.ocr.v1.OcrService/", "", "/"]
)
def test_not_routed(path: str) -> None:
    assert methods.find(path) is None


def test_metric_labels_do_not_grow_with_what_callers_make_up() -> None:
    made_up = {found.label for i in range(50) if (found := methods.find(f"/inkwell.ocr.v1.OcrService/M{i}"))}
    assert made_up == {"inkwell.ocr.v1.OcrService/other"}
