"""What ListAdapters and ListControls answer: the settings and the folders they name, as protobuf messages."""

from collections.abc import Mapping
from pathlib import Path

from inkwell.diffusion.v1 import diffusion_pb2 as pb
from services.diffusion import adapters_catalog
from services.diffusion.adapters_catalog import ControlKind, KnownAdapter
from services.diffusion.settings import Settings

_CONTROL_KINDS: dict[ControlKind, pb.ControlKind.ValueType] = {
    "controlnet": pb.CONTROL_KIND_CONTROLNET,
    "t2i_adapter": pb.CONTROL_KIND_T2I_ADAPTER,
}


def list_adapters(settings: Settings) -> pb.ListAdaptersResponse:
    """The LoRAs, embeddings and IP-Adapters that can be used; what is missing or pickled is left out."""
    kinds: list[tuple[pb.AdapterKind.ValueType, Mapping[str, KnownAdapter]]] = [
        (pb.ADAPTER_KIND_LORA, adapters_catalog.known_loras(settings)),
        (pb.ADAPTER_KIND_TEXTUAL_INVERSION, adapters_catalog.known_embeddings(settings)),
        (pb.ADAPTER_KIND_IMAGE_PROMPT, adapters_catalog.known_image_prompt_adapters(settings)),
    ]
    return pb.ListAdaptersResponse(
        adapters=[
            pb.Adapter(name=one.name, kind=kind, models=one.models, file_bytes=_size(one.file))
            for kind, known in kinds
            for one in known.values()
            if one.file is not None
        ]
    )


def list_controls(settings: Settings, preprocessors: Mapping[str, str]) -> pb.ListControlsResponse:
    """The controls that can be used, and the preprocessors. preprocessors: name to one sentence."""
    controls = adapters_catalog.known_controls(settings).values()
    return pb.ListControlsResponse(
        models=[
            pb.ControlModel(
                name=one.name, kind=_CONTROL_KINDS[one.kind], models=one.models, preprocessor=one.preprocessor
            )
            for one in controls
            if one.kind is not None
        ],
        preprocessors=[pb.Preprocessor(name=name, description=text) for name, text in preprocessors.items()],
    )


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # it went away since it was listed
        return 0
