"""Which adapters there are: looked up by name among what lies there, never by a path."""

from pathlib import Path
from typing import Any

import pytest

from inkwell.diffusion.v1 import diffusion_pb2 as pb
from services.diffusion import adapters_catalog as catalog
from services.diffusion import listing
from services.diffusion.settings import Settings
from tests.support.tiny_adapters import write_config


def settings_of(**given: Any) -> Settings:
    return Settings.model_validate({"loras": {}, "controls": {}, **given})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "adapters"
    place.mkdir()
    for name in ("ink.safetensors", "v1.5 (soft).safetensors", ".half-written.safetensors", "pickle.pt"):
        (place / name).write_bytes(b"12345")
    (place / "inside").mkdir()
    return place


class TestFolders:
    def test_its_safetensors_files_are_known_without_their_ending(self, folder: Path) -> None:
        settings = settings_of(lora_folder=str(folder), embedding_folder=str(folder))
        assert list(catalog.known_loras(settings)) == ["ink", "v1.5 (soft)"]
        assert list(catalog.known_embeddings(settings)) == ["ink", "v1.5 (soft)"]

    def test_it_is_looked_at_anew(self, folder: Path) -> None:
        settings = settings_of(lora_folder=str(folder))
        catalog.known_loras(settings)
        (folder / "new.safetensors").write_bytes(b"")
        (folder / "ink.safetensors").unlink()
        assert list(catalog.known_loras(settings)) == ["new", "v1.5 (soft)"]

    def test_one_that_is_not_there_holds_nothing(self, tmp_path: Path) -> None:
        assert catalog.known_loras(settings_of(lora_folder=str(tmp_path / "none"))) == {}

    def test_a_name_in_the_settings_hides_the_file(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "other.safetensors").write_bytes(b"")
        rows = {"ink": {"source": str(tmp_path / "other.safetensors"), "models": ["m"]}}
        ink = catalog.known_loras(settings_of(lora_folder=str(folder), loras=rows))["ink"]
        assert ink.file == tmp_path / "other.safetensors"
        assert ink.fits("m")
        assert not ink.fits("n")


class TestSources:
    @pytest.mark.parametrize(
        ("files", "trouble"),
        [
            (["a.safetensors"], ""),
            (["a.safetensors", "pytorch_lora_weights.safetensors"], ""),
            (["a.safetensors", "b.safetensors"], "several .safetensors files (a.safetensors, b.safetensors)"),
            (["a.bin"], "only pickled weights (a.bin)"),
            ([], "holds no .safetensors file"),
        ],
    )
    def test_a_folder_is_its_one_file(self, tmp_path: Path, files: list[str], trouble: str) -> None:
        place = tmp_path / "it"
        place.mkdir()
        for name in files:
            (place / name).write_bytes(b"")
        known = catalog.known_loras(settings_of(loras={"it": {"source": str(place)}}))["it"]
        assert known.trouble == trouble or (trouble and trouble in known.trouble)
        assert known.file == (None if trouble else place / files[-1])

    def test_what_is_missing_or_pickled_says_so(self, tmp_path: Path, folder: Path) -> None:
        rows = {
            "gone": {"source": str(tmp_path / "gone.safetensors")},
            "pickled": {"source": str(folder / "pickle.pt")},
        }
        known = catalog.known_loras(settings_of(loras=rows))
        assert known["gone"].trouble == "gone.safetensors is not there"
        assert "pickled weights can run code" in known["pickled"].trouble
        assert catalog.fitting(known, "m") == {}


class TestControls:
    @pytest.mark.parametrize("name", sorted(catalog.CONTROL_CLASSES))
    def test_the_config_says_the_kind(self, tmp_path: Path, name: str) -> None:
        place = write_config(tmp_path / "it", _class_name=name)
        (place / "diffusion_pytorch_model.safetensors").write_bytes(b"")
        control = catalog.known_controls(settings_of(controls={"it": {"source": str(place)}}))["it"]
        assert (control.kind, control.trouble) == (catalog.CONTROL_CLASSES[name], "")

    @pytest.mark.parametrize(
        ("content", "trouble"),
        [
            (None, "it has no config.json"),
            ("{", "is not JSON"),
            ("[]", "is not a JSON object"),
            ('{"_class_name": "UNet2DModel"}', "it is a UNet2DModel"),
            ("{}", "model without _class_name"),
            ('{"_class_name": "ControlNetModel"}', "holds no weights"),
        ],
    )
    def test_what_is_none_says_why(self, tmp_path: Path, content: str | None, trouble: str) -> None:
        place = tmp_path / "it"
        place.mkdir()
        if content is not None:
            (place / "config.json").write_text(content)
        control = catalog.known_controls(settings_of(controls={"it": {"source": str(place)}}))["it"]
        assert control.kind is None
        assert trouble in control.trouble
        assert str(tmp_path) not in control.trouble


class TestWords:
    @pytest.mark.parametrize(
        ("prompt", "found"),
        [
            ("a cat on a mat", ("cat",)),
            ("cat", ("cat",)),
            ("(Cat:1.2), [cat]", ("cat",)),
            ("embedding:cat", ("cat",)),
            ("(embedding:cat:1.2)", ("cat",)),
            ("cathedral, bobcat, cat_1, cat-like", ()),
            ("embedding:cathedral", ()),
            ("<lora:cat:0.8>", ()),
            ("<lora:cat:0.8> cat", ("cat",)),
            ("a <cat-toy>, cat", ("<cat-toy>", "cat")),
            ("bad.v2+ cat", ("bad.v2+", "cat")),
            ("dog DOG", ("dog", "DOG")),
            ("Dog", ("dog",)),
            ("", ()),
        ],
    )
    def test_a_name_counts_as_a_word_of_its_own(self, prompt: str, found: tuple[str, ...]) -> None:
        assert catalog.embeddings_in(prompt, ["cat", "<cat-toy>", "bad.v2+", "dog", "DOG"]) == found

    def test_without_embeddings_no_word_counts(self) -> None:
        assert catalog.embeddings_in("embedding:cat", []) == ()


class TestListing:
    def test_adapters(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "word.safetensors").write_bytes(b"123")
        encoder = write_config(tmp_path / "encoder")
        settings = settings_of(
            lora_folder=str(folder),
            loras={"gone": {"source": "gone.safetensors"}},
            embeddings={"word": {"source": str(tmp_path / "word.safetensors"), "models": ["m"]}},
            image_prompt_adapters={
                "ip": {"source": str(folder / "ink.safetensors"), "image_encoder": str(encoder)},
                "blind": {"source": str(folder / "ink.safetensors"), "image_encoder": str(tmp_path / "none")},
            },
        )
        found = [
            (one.name, one.kind, list(one.models), one.file_bytes) for one in listing.list_adapters(settings).adapters
        ]
        assert found == [
            ("ink", pb.ADAPTER_KIND_LORA, [], 5),
            ("v1.5 (soft)", pb.ADAPTER_KIND_LORA, [], 5),
            ("word", pb.ADAPTER_KIND_TEXTUAL_INVERSION, ["m"], 3),
            ("ip", pb.ADAPTER_KIND_IMAGE_PROMPT, [], 5),
        ]

    def test_controls(self, tmp_path: Path) -> None:
        place = write_config(tmp_path / "it", _class_name="T2IAdapter")
        (place / "model.safetensors").write_bytes(b"")
        rows = {
            "lines": {"source": str(place), "models": ["m"], "preprocessor": "canny"},
            "gone": {"source": str(tmp_path / "gone")},
        }
        answer = listing.list_controls(settings_of(controls=rows), {"canny": "Finds edges."})
        assert [(one.name, one.kind, list(one.models), one.preprocessor) for one in answer.models] == [
            ("lines", pb.CONTROL_KIND_T2I_ADAPTER, ["m"], "canny")
        ]
        assert [(one.name, one.description) for one in answer.preprocessors] == [("canny", "Finds edges.")]
