"""The SDK says everything that the protos say: a field or a call added there is missed here until the SDK has it."""

import dataclasses
import inspect
from typing import Any

import pytest

import inkwell
from inkwell.common.v1 import common_pb2
from inkwell.compiler.v1 import compiler_pb2
from inkwell.converters import document, embed
from inkwell.converters.document import DocumentOptions
from inkwell.converters.read import ReadOptions
from inkwell.diffusion.v1 import diffusion_pb2
from inkwell.gateway.v1 import gateway_pb2
from inkwell.ocr.v1 import ocr_pb2
from inkwell.operations.v1 import operations_pb2
from inkwell.types import PaintOptions

# Message → dataclass with the same fields.
SAME: list[tuple[Any, type]] = [
    (ocr_pb2.Token, inkwell.Token),
    (ocr_pb2.Hypothesis, inkwell.Hypothesis),
    (ocr_pb2.Model, inkwell.OcrModel),
    (ocr_pb2.DecodingOptions, inkwell.Decoding),
    (diffusion_pb2.GenerationParameters, inkwell.GenerationParameters),
    (diffusion_pb2.Model, inkwell.DiffusionModel),
    (diffusion_pb2.Scheduler, inkwell.Scheduler),
    (gateway_pb2.Pool, inkwell.Pool),
    (gateway_pb2.Endpoint, inkwell.Endpoint),
    (common_pb2.Timing, inkwell.Timing),
    (common_pb2.Image, inkwell.Image),
    (ocr_pb2.ExportChunk, inkwell.Export),
    (ocr_pb2.DocumentLine, inkwell.DocumentLine),
    (diffusion_pb2.InpaintParameters, inkwell.InpaintParameters),
    (diffusion_pb2.ControlParameters, inkwell.ControlParameters),
    (diffusion_pb2.ImagePromptParameters, inkwell.ImagePromptParameters),
    (diffusion_pb2.Inpaint, inkwell.Inpaint),
    (diffusion_pb2.Outpaint, inkwell.Outpaint),
    (diffusion_pb2.Control, inkwell.Control),
    (diffusion_pb2.ImagePrompt, inkwell.ImagePrompt),
    (diffusion_pb2.Lora, inkwell.Lora),
    (diffusion_pb2.Hires, inkwell.Hires),
    (diffusion_pb2.Refiner, inkwell.Refiner),
    (diffusion_pb2.Sampling, inkwell.Sampling),
    (diffusion_pb2.PerturbedAttention, inkwell.PerturbedAttention),
    (diffusion_pb2.FreeU, inkwell.FreeU),
    (diffusion_pb2.Variation, inkwell.Variation),
    (diffusion_pb2.Vae, inkwell.Vae),
    (diffusion_pb2.Adapter, inkwell.Adapter),
    (diffusion_pb2.ControlModel, inkwell.ControlModel),
    (diffusion_pb2.Preprocessor, inkwell.Preprocessor),
    (diffusion_pb2.ListControlsResponse, inkwell.Controls),
    (compiler_pb2.Artifact, inkwell.Artifact),
    (compiler_pb2.ArtifactFile, inkwell.ArtifactFile),
    (compiler_pb2.Check, inkwell.Check),
    (compiler_pb2.Figure, inkwell.Figure),
    (compiler_pb2.CompileMetadata, inkwell.CompileMetadata),
    (compiler_pb2.ListTargetsResponse, inkwell.Targets),
    (compiler_pb2.CompilableModel, inkwell.CompilableModel),
    (compiler_pb2.TargetSupport, inkwell.TargetSupport),
]

# Message → dataclass with the same fields and these more.
MORE: list[tuple[Any, type, set[str]]] = [
    (ocr_pb2.Recognition, inkwell.Reading, {"served_by"}),
    (ocr_pb2.PartialText, inkwell.Partial, {"sequence"}),
    (common_pb2.Queued, inkwell.Queued, {"sequence"}),
    (common_pb2.Started, inkwell.Started, {"sequence"}),
    (common_pb2.Progress, inkwell.Progress, {"sequence"}),
    (diffusion_pb2.Preview, inkwell.Preview, {"sequence"}),
    (ocr_pb2.DocumentPage, inkwell.DocumentPage, {"lines"}),
    (ocr_pb2.DocumentProgress, inkwell.DocumentProgress, {"sequence"}),
    (ocr_pb2.DocumentResult, inkwell.Document, {"pages", "exports", "served_by"}),
    (ocr_pb2.LineRead, inkwell.LineRead, {"sequence"}),
    (ocr_pb2.LoadProgress, inkwell.LoadProgress, {"sequence"}),
    (ocr_pb2.LoadResult, inkwell.LoadResult, {"sequence"}),
    (diffusion_pb2.LoadProgress, inkwell.LoadProgress, {"sequence"}),
    (diffusion_pb2.LoadResult, inkwell.LoadResult, {"sequence", "elapsed_ms"}),
    (diffusion_pb2.GenerateResult, inkwell.PaintResult, {"sequence", "served_by"}),
    (common_pb2.Tensor, inkwell.Embeddings, {"model", "timing", "served_by"}),
]

# Fields that the dataclass calls otherwise, or that say how the message travels.
RENAMED: dict[Any, dict[str, str | None]] = {
    ocr_pb2.ExportChunk: {"is_last": None},
    ocr_pb2.DocumentLine: {"recognition": "reading"},
    diffusion_pb2.GenerateResult: {"images": "pictures"},
}


def fields_of(message: Any) -> set[str]:
    renamed = RENAMED.get(message, {})
    return {name for field in message.DESCRIPTOR.fields if (name := renamed.get(field.name, field.name))}


def names_of(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize(("message", "kind"), SAME, ids=lambda value: value.__name__)
def test_results_have_the_fields_of_their_message(message: Any, kind: type) -> None:
    assert names_of(kind) == fields_of(message)


@pytest.mark.parametrize(("message", "kind", "more"), MORE, ids=lambda value: getattr(value, "__name__", ""))
def test_results_have_at_least_the_fields_of_their_message(message: Any, kind: type, more: set[str]) -> None:
    assert names_of(kind) == fields_of(message) | more


def test_the_progress_of_an_operation_has_all_that_its_messages_have() -> None:
    nested = fields_of(operations_pb2.OperationProgress) - {"progress"} | fields_of(common_pb2.Progress)
    assert names_of(inkwell.OperationProgress) == nested | {"sequence"}


def test_every_event_has_its_dataclass() -> None:
    def events(message: Any) -> set[str]:
        return {field.name for field in message.DESCRIPTOR.oneofs_by_name["event"].fields}

    assert events(ocr_pb2.StreamRecognizeResponse) == {"queued", "started", "partial", "result"}
    assert events(ocr_pb2.ReadDocumentResponse) == {
        "queued", "started", "progress", "page_started", "line", "page", "export", "result",
    }  # fmt: skip
    assert events(ocr_pb2.LoadModelResponse) == {"progress", "result"}
    assert events(diffusion_pb2.LoadModelResponse) == {"progress", "result"}
    assert events(operations_pb2.WatchResponse) == {"queued", "started", "progress", "done"}
    assert events(diffusion_pb2.GenerateResponse) == {"queued", "started", "progress", "preview", "result"}


def test_every_request_field_can_be_given() -> None:
    line = {"model", "decoding", "language_hints"}
    assert names_of(ReadOptions) == {"model", "languages"} | fields_of(ocr_pb2.DecodingOptions)
    for request in (ocr_pb2.RecognizeRequest, ocr_pb2.StreamRecognizeRequest, ocr_pb2.BatchRecognizeRequest):
        assert fields_of(request) - {"id"} == line | {"image"}
    # The content decides what kind of file it is.
    renamed = {"page_ranges": "pages", "export_formats": "export"}
    plain = fields_of(ocr_pb2.ReadDocumentRequest) - line - {"content", "media_type"}
    assert names_of(DocumentOptions) == {"read"} | {renamed.get(name, name) for name in plain}
    embedding = set(inspect.signature(inkwell.Client.embed).parameters)
    assert embedding == fields_of(ocr_pb2.EmbedRequest) | {"self", "timeout_s", "request_id"}
    load = set(inspect.signature(inkwell.Client.load_model_stream).parameters)
    assert load == fields_of(ocr_pb2.LoadModelRequest) | {"self", "service", "timeout_s"}
    assert load >= fields_of(diffusion_pb2.LoadModelRequest)
    compiling = fields_of(compiler_pb2.CompileRequest) - {"model", "target", "budget"}
    assert inkwell.CompileOptions.__optional_keys__ == compiling | fields_of(compiler_pb2.QualityBudget)
    listing = set(inspect.signature(inkwell.Client.artifacts).parameters)
    paging = {"page_size", "page_token"}
    assert listing == fields_of(compiler_pb2.ListArtifactsRequest) - paging | {"self", "timeout_s"}
    renamed = {"step_count": "steps"}
    plain = {renamed.get(name, name) for name in fields_of(diffusion_pb2.GenerateRequest)}
    previews = {"previews", "preview_interval", "preview_method", "preview_max_side_px"}
    assert fields_of(diffusion_pb2.PreviewOptions) == {"disabled", "step_interval", "method", "max_side_px"}
    output = fields_of(diffusion_pb2.OutputOptions)
    assert PaintOptions.__optional_keys__ == plain - {"prompt", "output", "preview"} | output | previews


def test_every_call_has_a_method() -> None:
    calls = {
        f"{service.name}.{method.name}"
        for module in (ocr_pb2, diffusion_pb2, gateway_pb2, operations_pb2, compiler_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert calls == {
        "OcrService.Recognize",  # read
        "OcrService.StreamRecognize",  # read_stream
        "OcrService.BatchRecognize",  # read_many
        "OcrService.ReadDocument",  # read_document, read_document_stream
        "OcrService.Embed",  # embed
        "OcrService.ListModels",  # models
        "OcrService.LoadModel",  # load_model, load_model_stream
        "OcrService.UnloadModel",  # unload_model
        "DiffusionService.Generate",  # paint, paint_stream
        "DiffusionService.ListModels",  # models
        "DiffusionService.LoadModel",  # load_model, load_model_stream
        "DiffusionService.UnloadModel",  # unload_model
        "DiffusionService.ListSchedulers",  # schedulers
        "DiffusionService.ListAdapters",  # adapters
        "DiffusionService.ListControls",  # controls
        "GatewayService.ListPools",  # fleet
        "CompilerService.Compile",  # compile
        "CompilerService.ListTargets",  # targets
        "CompilerService.ListArtifacts",  # artifacts
        "CompilerService.GetArtifact",  # artifact
        "CompilerService.DownloadArtifact",  # download_artifact
        "CompilerService.UseArtifact",  # use_artifact
        "CompilerService.DeleteArtifact",  # delete_artifact
        "OperationsWatchService.Watch",  # operation(…).events
    }


@pytest.mark.parametrize(
    ("enum", "kind", "prefix"),
    [
        (common_pb2.ModelState, inkwell.ModelState, "MODEL_STATE_"),
        (gateway_pb2.EndpointState, inkwell.EndpointState, "ENDPOINT_STATE_"),
        (ocr_pb2.LoadStage, inkwell.LoadStage, "LOAD_STAGE_"),
        (ocr_pb2.Precision, inkwell.Precision, "PRECISION_"),
        (compiler_pb2.Precision, inkwell.Precision, "PRECISION_"),
        (compiler_pb2.Target, inkwell.Target, "TARGET_"),
        (ocr_pb2.EarlyStopping, inkwell.EarlyStopping, "EARLY_STOPPING_"),
        (ocr_pb2.ExportFormat, inkwell.ExportFormat, "EXPORT_FORMAT_"),
        (diffusion_pb2.LoadStage, inkwell.LoadStage, "LOAD_STAGE_"),
        (diffusion_pb2.PromptSyntax, inkwell.PromptSyntax, "PROMPT_SYNTAX_"),
        (diffusion_pb2.MaskFill, inkwell.MaskFill, "MASK_FILL_"),
        (diffusion_pb2.SigmaSchedule, inkwell.SigmaSchedule, "SIGMA_SCHEDULE_"),
        (diffusion_pb2.TimestepSpacing, inkwell.TimestepSpacing, "TIMESTEP_SPACING_"),
        (diffusion_pb2.PredictionType, inkwell.PredictionType, "PREDICTION_TYPE_"),
        (diffusion_pb2.PreviewMethod, inkwell.PreviewMethod, "PREVIEW_METHOD_"),
        (diffusion_pb2.AdapterKind, inkwell.AdapterKind, "ADAPTER_KIND_"),
        (diffusion_pb2.ControlKind, inkwell.ControlKind, "CONTROL_KIND_"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_enum_value_has_its_name(enum: Any, kind: Any, prefix: str) -> None:
    names = {name.removeprefix(prefix) for name in enum.keys()}  # noqa: SIM118
    assert names - {"UNSPECIFIED"} == set(kind.__members__) - {"UNKNOWN"}


def test_every_pooling_and_number_type_and_orientation_can_be_asked_for() -> None:
    assert len(ocr_pb2.Pooling.keys()) - 1 == len(embed._POOLINGS)
    assert len(common_pb2.TensorType.keys()) - 1 == len(embed._DTYPES)
    assert set(ocr_pb2.PageOrientation.values()) == set(document._ORIENTATIONS.values())
