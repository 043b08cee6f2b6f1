"""Every knob of the OCR service. Each is an environment variable: INKWELL_OCR_ and the name in upper case."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from services.kit.settings import MIB, RepeatSettings
from services.ocr.domain import BEAM_WIDTH_MOST, Precision, Runtime
from services.ocr.languages import is_tag

# The rest is for activations, caches and everything else on the machine.
MEMORY_SHARE = 0.7

_EMBEDDED = Path(__file__).resolve().parents[2] / "models" / "handwriting-tiny"


class Settings(RepeatSettings):
    """The OCR service's settings; an unknown or unfit value stops the service at its start with a message."""

    model_config = SettingsConfigDict(env_prefix="INKWELL_OCR_", extra="forbid", frozen=True)

    port: int = Field(50051, ge=0, le=65535, description="gRPC port; 0 takes a free one")
    # Room for a whole document; a gateway lets as much through.
    max_message_bytes: int = Field(64 * MIB, ge=1024, description="largest request message")

    models: dict[str, str] = Field(
        default_factory=lambda: {"handwriting-tiny": str(_EMBEDDED)},
        min_length=1,
        description="JSON object, name to source: a TrOCR folder, or a hub id with its revision as owner/name@revision",
    )
    default_model: str = Field("", description="model that an empty name means; empty takes the first of `models`")
    model_folder: str = Field(
        "",
        description="folder whose subfolders are models too, each under its own name; looked at again whenever models"
        " are listed or one is asked for, so that a new one can be loaded while serving. Empty: none",
    )
    load_at_start: list[str] | None = Field(
        None,
        description="JSON list of the models that are loaded before the service is ready, unset for all of `models`;"
        " the others are loaded when a call or LoadModel names them",
    )
    languages: dict[str, list[str]] = Field(
        default_factory=dict,
        description='JSON object, model name to list of BCP 47 tags, such as {"mine": ["fr", "oc"]}, in place of those'
        " that its model card declares",
    )
    memory_limit_bytes: int = Field(
        0,
        ge=0,
        description="memory that the weights of all loaded models may take, bytes; the least recently used leave when"
        f" it is short. 0 takes {MEMORY_SHARE:.0%} of what is free on the device at the start",
    )
    allow_pickled_weights: bool = Field(
        False, description="load weights that are not safetensors; a pickle can run code, so only from trusted sources"
    )
    precision: Literal["auto"] | Precision = Field(
        "auto",
        description="what weights are computed with: float32, bfloat16, float16, int8_dynamic, int8_weight_only,"
        " int8_static, or for artifacts int4_weight_only; auto is that of the artifact, and on torch float32 on cpu and"
        " the best 16-bit type elsewhere",
    )
    runtime: Literal["auto"] | Runtime = Field(
        "auto",
        description="what computes the models: torch, or onnxruntime, openvino, tensorrt or triton from an artifact"
        " that the compiler made of the model; auto takes the artifact that `inkwell use` chose, else the fastest that"
        " was measured to be faster than torch on such hardware, else torch",
    )
    artifact_store: str = Field(
        "",
        description="where the compiler keeps artifacts: a folder, or s3://bucket/prefix; empty for"
        " ~/.local/share/inkwell/artifacts",
    )
    triton_address: str = Field(
        "", description="host:port of a Triton server's gRPC, grpcs://host:port with TLS, for the runtime triton"
    )
    triton_timeout_s: float = Field(60.0, gt=0, description="seconds that one call of a graph on Triton may take")
    triton_shared_memory: bool = Field(
        False,
        description="pass tensors to Triton through /dev/shm; the server has to run on this host, as the same user",
    )
    device: str = Field(
        "auto", description='torch device, such as "cpu" or "cuda:1"; auto takes the best there is', min_length=1
    )
    threads: int = Field(0, ge=0, description="CPU threads of the engine; 0 takes one a core")
    torch_compile: Literal["off", "on"] = Field(
        "off",
        description="on: what torch runs is tuned for speed over repeatable last bits: the encoder by torch.compile,"
        " which compiles at the start and needs a C++ compiler on the machine; kernels chosen by trial and"
        " TF32 on GPUs. 8-bit precisions and artifacts are left as they are",
    )

    max_rows: int = Field(64, ge=BEAM_WIDTH_MOST, description="decoder rows (a beam is one) that share a step, a model")
    max_jobs: int = Field(32, ge=1, description="calls the engine is given at a time; the rest waits in the queue")
    encoder_batch_size: int = Field(8, ge=1, description="images encoded together at most")
    encoder_step_ms: float = Field(
        250.0,
        gt=0,
        description="aim for the length of one encoder step in ms: on slow hardware fewer images are encoded together,"
        " so that rows under way and cancellations do not wait",
    )
    encoder_wait_ms: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="how long an image waits for others to be encoded with while there are fewer than"
        " encoder_batch_size, ms; the lines being decoded go on meanwhile. Worth something only on hardware that"
        " encodes several images in about the time of one",
    )
    detect_blank: bool = Field(
        True, description="answer images without writing with an empty text instead of letting the model make one up"
    )
    default_max_new_token_count: int = Field(
        128, ge=1, description="tokens to decode at most where neither the call nor the model's own files say"
    )
    max_new_token_limit: int = Field(
        512, ge=1, description="tokens a call may ask for at most; the model may allow less"
    )

    embed_image_limit: int = Field(64, ge=1, description="images of one Embed call")
    embed_reply_bytes_limit: int = Field(
        32 * MIB, ge=1024, description="largest tensor that Embed answers with, bytes; clients bound messages too"
    )
    read_documents: bool = Field(True, description="load what finds the lines of a page, for ReadDocument")

    max_image_bytes: int = Field(20 * MIB, ge=1, description="largest encoded image, bytes")
    max_image_pixels: int = Field(50_000_000, ge=1, description="most pixels (width x height) of an image")
    min_image_side: int = Field(4, ge=1, description="smallest width and height, pixels")
    decode_threads: int = Field(2, ge=1, description="threads that decode images in the front process")
    batch_in_flight: int = Field(
        16, ge=1, description="items of one BatchRecognize stream under way at a time; the stream is not read further"
    )
    batch_item_limit: int = Field(1_000_000, ge=1, description="items of one BatchRecognize stream")

    documents_at_a_time: int = Field(2, ge=1, description="documents under way at a time; the others wait")
    document_queue_limit: int = Field(16, ge=1, description="documents that may wait")
    document_lines_in_flight: int = Field(
        8, ge=1, description="lines of one document in the engine or its queue at a time; the rest is left to others"
    )
    max_document_bytes: int = Field(48 * MIB, ge=1, description="largest encoded document, bytes")
    max_document_pages: int = Field(500, ge=1, description="most pages that one ReadDocument call may read")
    max_page_pixels: int = Field(40_000_000, ge=1, description="most pixels (width x height) of a page")
    max_page_lines: int = Field(1000, ge=1, description="most lines of a page")
    document_memory_bytes: int = Field(
        2048 * MIB,
        ge=256 * MIB,
        description="address space of the process that a document is opened in, bytes; each document has its own",
    )
    document_step_s: float = Field(
        60.0, gt=0, description="processor time that opening a document or rendering a page may take, seconds"
    )

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        for name, source in self.models.items():
            if not name or not source:
                raise ValueError("models: a name and a source must not be empty")
        if self.default_model and self.default_model not in self.models:
            raise ValueError(f"default_model: {self.default_model!r} is not one of models: {', '.join(self.models)}")
        if self.model_folder and not Path(self.model_folder).expanduser().is_dir():
            raise ValueError(f"model_folder: there is no folder {self.model_folder}")
        for name, tags in self.languages.items():
            for tag in tags:
                if not is_tag(tag):
                    raise ValueError(f"languages: {tag!r} of {name} is not a BCP 47 language tag, such as fr or uk-UA")
        return self

    @property
    def names_at_start(self) -> list[str]:
        """The models loaded before the service is ready, the default one first: later ones may find no room."""
        names = list(self.models) if self.load_at_start is None else self.load_at_start
        return sorted(dict.fromkeys(names), key=lambda name: name != self.default_model_name)

    @property
    def default_model_name(self) -> str:
        """The model that an empty name in a request means."""
        return self.default_model or next(iter(self.models))
