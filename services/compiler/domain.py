"""What the compiler talks about: requests, exported graphs, progress. No gRPC, no torch at import."""

from typing import Literal

import msgspec

from services.runtimes.artifacts.manifest import ArtifactPrecision, Target

Stage = Literal["fetching", "exporting", "checking", "quantizing", "building", "verifying", "measuring", "publishing"]


class Budget(msgspec.Struct, frozen=True):
    """How much worse a quantized model may be; layers return to float until it holds."""

    character_error_rate: float = 0.01  # absolute, over the error rate of the float32 model
    psnr_db: float = 30.0  # of pictures against the float32 model's with the same seeds, at least


class CompileRequest(msgspec.Struct, frozen=True):
    """One compile, checked. source: a folder or hub id at a revision, as the services' settings name models."""

    model: str
    source: str
    target: Target
    precision: ArtifactPrecision
    hardware: str = ""  # label that the artifact is for; "" for this machine's
    # Precision of single components ("vae_decoder" -> "float32"), in place of `precision`.
    component_precisions: dict[str, ArtifactPrecision] = {}
    # Layers that stay in float: shell patterns over the graph's layer names, such as "decoder/*lm_head*".
    excluded_layers: tuple[str, ...] = ()
    budget: Budget = Budget()
    # A folder of line images with labels.tsv, or of prompts.txt, to calibrate and measure on; "" for what ships.
    calibration_folder: str = ""
    max_batch_size: int = 64  # rows of a decoder step, images of an encoder, pictures
    # Sides of pictures in pixels; 0 for the model's own size. Only TensorRT and Triton are bound to them.
    max_side_px: int = 0


class CompileProgress(msgspec.Struct, frozen=True):
    """Where a compile stands. note: what goes on in words, for people ("decoder: int8, trying without layer 11")."""

    stage: Stage
    step: int
    step_count: int
    note: str


class CompileJob(msgspec.Struct, frozen=True):
    """What the child process is given. staging: a folder of the store's, for the files of the artifact."""

    request: CompileRequest
    store: str  # as open_store takes it
    staging: str
    allow_pickled_weights: bool = False


class CompileResult(msgspec.Struct, frozen=True):
    """The artifact that came of it, or that there was already.

    manifest_json: kept with the operation, so that what came of it can be told even when the store is away, or the
    artifact deleted.
    """

    artifact_id: str
    manifest_json: str
