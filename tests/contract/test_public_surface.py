"""What client programs may rely on. A failure here is a change that they will notice: change it knowingly."""

import dataclasses
import inspect
import re
import subprocess
import sys
import tomllib
import typing
from pathlib import Path
from typing import Any

import pytest

import inkwell

ROOT = Path(__file__).resolve().parents[2]

CONNECTION = [
    "hardware", "priority", "timeout_s", "wait_for_ready_s", "credentials", "token", "metadata",
]  # fmt: skip
READING = [
    "model", "languages", "beam_width", "hypothesis_count", "length_penalty", "max_new_token_count",
    "no_repeat_ngram_size", "early_stopping", "timeout_s",
]  # fmt: skip
DOCUMENTS = ["pages", "dpi", "min_confidence", "orientation", "export", *READING]
# The options of painting stand in a TypedDict, PaintOptions.
PAINTING = [
    "negative_prompt", "model", "width", "height", "steps", "guidance_scale", "scheduler", "seed", "image_count",
    "batch_count", "media_type", "quality", "prompt_syntax", "styles", "wildcard_seed", "image", "strength", "inpaint",
    "outpaint", "controls", "image_prompts", "loras", "hires", "refiner", "sampling", "guidance_rescale",
    "perturbed_attention", "freeu", "clip_skip", "variation", "vae", "previews", "preview_interval", "preview_method",
    "preview_max_side_px", "progress_interval_ms",
]  # fmt: skip

# Method → (positional parameters, keyword-only parameters).
METHODS: dict[str, tuple[list[str], list[str]]] = {
    "__init__": (["target"], CONNECTION),
    "read": (["image"], [*READING, "request_id", "on_event"]),
    "read_stream": (["image"], [*READING, "request_id"]),
    "read_many": (["images"], READING),
    "read_document": (["document"], [*DOCUMENTS, "request_id", "on_event"]),
    "read_document_stream": (["document"], [*DOCUMENTS, "request_id"]),
    "embed": (["images"], ["model", "pooling", "dtype", "normalize", "timeout_s", "request_id"]),
    "paint": (["prompt"], ["timeout_s", "request_id", "on_event", *PAINTING]),
    "paint_stream": (["prompt"], ["timeout_s", "request_id", *PAINTING]),
    "models": (["service"], ["timeout_s"]),
    "load_model": (["name"], ["service", "precision", "artifact", "runtime", "timeout_s", "on_event"]),
    "load_model_stream": (["name"], ["service", "precision", "artifact", "runtime", "timeout_s"]),
    "unload_model": (["name"], ["service", "timeout_s"]),
    "schedulers": ([], ["timeout_s"]),
    "adapters": ([], ["timeout_s"]),
    "controls": ([], ["timeout_s"]),
    "fleet": ([], ["service", "hardware", "timeout_s"]),
    "operation": (["name"], ["timeout_s"]),
    "operations": (["service"], ["done", "timeout_s"]),
    "compile": (
        ["model", "target"],
        [
            "timeout_s", "precision", "hardware", "component_precisions", "excluded_layers", "character_error_rate",
            "psnr_db", "max_batch_size", "max_side_px", "request_id",
        ],
    ),
    "targets": ([], ["timeout_s"]),
    "artifacts": ([], ["model", "target", "precision", "timeout_s"]),
    "artifact": (["id"], ["timeout_s"]),
    "download_artifact": (["id", "folder"], ["timeout_s", "on_progress"]),
    "use_artifact": (["model", "artifact"], ["timeout_s"]),
    "delete_artifact": (["id"], ["timeout_s"]),
    "close": ([], []),
}  # fmt: skip

NAMES = [
    "Adapter", "AdapterKind", "Artifact", "ArtifactFile", "AsyncClient", "AsyncOperation", "Cancelled", "Check",
    "Client",
    "CompilableModel", "CompileMetadata", "CompileOptions", "Control", "ControlKind",
    "ControlModel", "ControlParameters", "Controls", "DeadlineExceeded", "Decoding", "DiffusionModel", "Document",
    "DocumentEvent", "DocumentLine", "DocumentPage", "DocumentProgress", "DocumentResult", "DownloadProgress",
    "EarlyStopping",
    "Embeddings", "Endpoint", "EndpointState", "Export", "ExportFormat", "ExportReady", "FailedPrecondition",
    "FieldViolation", "Figure", "FreeU", "GenerationParameters", "Hires", "Hypothesis", "Image", "ImagePrompt",
    "ImagePromptParameters", "ImageSource", "InkwellError", "Inpaint", "InpaintParameters", "InternalError",
    "InvalidRequest", "LineRead", "LoadEvent", "LoadProgress", "LoadResult", "LoadStage", "Lora", "MaskFill", "Model",
    "ModelState", "NotFound", "OcrModel", "Operation", "OperationDone", "OperationEvent", "OperationProgress",
    "Outpaint", "Overloaded", "PageRead", "PageStarted", "PaintEvent", "PaintOptions", "PaintResult", "Partial",
    "PermissionDenied", "PerturbedAttention", "Picture", "PictureSource", "Pool", "Precision", "PredictionType",
    "Preprocessor", "Preview", "PreviewMethod", "Progress", "PromptSyntax", "Queued", "ReadEvent", "ReadResult",
    "Reading", "Refiner", "Sampling", "Scheduler", "ServedBy", "SigmaSchedule", "Started", "Target",
    "TargetSupport", "Targets",
    "TimestepSpacing", "Timing",
    "Token", "TooLarge", "Unauthenticated", "Unavailable", "Unimplemented", "Vae", "Variation", "__version__",
    "embedded_parameters", "repeat_options", "tls",
]  # fmt: skip


def test_the_names_are_these() -> None:
    assert sorted(inkwell.__all__) == sorted(NAMES)
    assert all(hasattr(inkwell, name) for name in NAMES)


@pytest.mark.parametrize("client", [inkwell.Client, inkwell.AsyncClient])
@pytest.mark.parametrize("method", METHODS)
def test_everything_but_the_subject_is_keyword_only(client: type, method: str) -> None:
    parameters = list(inspect.signature(getattr(client, method)).parameters.values())[1:]
    positional = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    keywords = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
    unpacked = [each.name for each in parameters if each.kind is each.VAR_KEYWORD]
    assert len(parameters) == len(positional) + len(keywords) + len(unpacked)
    for name in unpacked:
        (options,) = typing.get_args(typing.get_type_hints(getattr(client, method))[name])
        assert options.__total__ is False
        keywords += options.__annotations__
    assert (positional, keywords) == METHODS[method]


@pytest.mark.parametrize("method", METHODS)
def test_both_clients_have_the_same_defaults(method: str) -> None:
    blocking, asynchronous = (
        {each.name: each.default for each in inspect.signature(getattr(client, method)).parameters.values()}
        for client in (inkwell.Client, inkwell.AsyncClient)
    )
    assert blocking == asynchronous


def test_clients_have_no_other_public_methods() -> None:
    for client in (inkwell.Client, inkwell.AsyncClient):
        assert {name for name in dir(client) if not name.startswith("_")} == set(METHODS) - {"__init__"}


def public_classes() -> list[type]:
    return [value for name in NAMES if inspect.isclass(value := getattr(inkwell, name))]


def test_results_are_frozen_dataclasses_without_protobuf() -> None:
    results = [each for each in public_classes() if dataclasses.is_dataclass(each)]
    assert len(results) >= 20
    for each in results:
        assert each.__dataclass_params__.frozen, each  # type: ignore[attr-defined]
        for field in dataclasses.fields(each):
            assert "pb2" not in str(field.type), field


def test_every_error_is_an_inkwell_error_with_a_hint_and_stands_in_the_drawn_tree() -> None:
    errors = [each for each in public_classes() if issubclass(each, inkwell.InkwellError)]
    drawing = (sys.modules["inkwell.errors"].__doc__ or "").split()
    for each in errors:
        assert each("what happened").hint.endswith(".")
        assert each.__name__ in drawing
    subclasses = set(inkwell.InkwellError.__subclasses__())
    assert subclasses == set(errors) - {inkwell.InkwellError}


def test_every_public_name_has_a_docstring() -> None:
    for each in public_classes():
        assert each.__doc__, each
    for client in (inkwell.Client, inkwell.AsyncClient):
        for method in METHODS:
            assert getattr(client, method).__doc__, method


def test_the_package_is_typed_and_says_its_version() -> None:
    assert (ROOT / "inkwell" / "py.typed").exists()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", inkwell.__version__)
    assert project["scripts"]["inkwell"] == "inkwell.cli:main"


USERS = """
from pathlib import Path
import inkwell
with inkwell.Client("localhost:1", hardware="cuda, cpu", metadata={"x": "y"}) as client:
    reading: inkwell.Reading = client.read("line.png")
    text: str = client.read(Path("line.png"), on_event=print).text
    for name, got in client.read_many({"a": "a.png"}.items()):
        line: str = got.text if isinstance(got, inkwell.Reading) else got.hint
    document: inkwell.Document = client.read_document("a.pdf", pages="1-3", export=["hocr"], languages="fr")
    files: list[Path] = [export.save("a") for export in document.exports.values()]
    boxes: list[float] = [x for line in document.lines for x, y in line.polygon]
    numbers: list[int] = list(client.embed(["a.png"], pooling="cls").shape)
    width: int = client.load_model("x", precision=inkwell.Precision.INT8_DYNAMIC).embedding_width
    multiple: int = client.load_model("x", service="diffusion").size_multiple
    options: inkwell.PaintOptions = {"steps": 9, "hires": 2, "loras": ["a", ("b", 0.5), inkwell.Lora("c")]}
    picture: inkwell.Picture = client.paint("x", **options, timeout_s=9)[0]
    client.paint("x", image=picture, inpaint="mask.png", controls=[inkwell.Control(Path("edges.png"))], on_event=print)
    client.paint(picture.parameters.prompt, **inkwell.repeat_options(picture.parameters, ["photo.png"]))
    names: list[str] = [each.name for each in client.controls().models] + [each.name for each in client.adapters()]
    for event in client.paint_stream("x"):
        if isinstance(event, inkwell.PaintResult):
            saved: Path = event.pictures[0].save("x.png")
async def main() -> None:
    async with inkwell.AsyncClient() as client:
        reading: inkwell.Reading = await client.read(b"")
        async for event in client.read_stream(b""):
            number: int = event.sequence
        pictures: list[inkwell.Picture] = await client.paint("x", seed=1, sampling=inkwell.Sampling("karras"))
        painter: inkwell.DiffusionModel = await client.unload_model("x", service="diffusion")
"""


def test_programs_type_check_against_it(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text(USERS)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml"), str(program)]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_wrong_programs_do_not(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text(
        "import inkwell\nx: int = inkwell.Client().read(b'').text\ninkwell.Client().paint('x', 'model')\n"
        "inkwell.Client().paint('x', stepz=1)\ninkwell.Client().paint('x', hires='2')\n"
    )
    command: list[Any] = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(program)]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert set(re.findall(r"program.py:(\d+): error:", checked.stdout)) == {"2", "3", "4", "5"}, checked.stdout
