"""LoRAs, embeddings and IP-Adapters: read on first use, refused with a reason, dropped when others need the room."""

import gc
import os
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionXLPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from services.diffusion.domain import FreeU, ImagePrompt, Lora, Parameters
from services.diffusion.engine.adapters import Adapters
from services.diffusion.settings import Settings
from services.kit.faults import Fault, FaultData, Kind
from tests.support import diffusion_families, tiny_adapters, tiny_diffusion
from tests.unit.diffusion.studio import MODEL, Studio, call, open_studio, parameters


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_diffusion.make_folder(tmp_path_factory.mktemp("adapters") / "tiny", preview=False)


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_adapters.make_lora(base, tmp_path_factory.mktemp("lora"), 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of adapters that a test fills."""
    place = tmp_path / "adapters"
    place.mkdir()
    return place


@pytest.fixture
def studio(base: Path, folder: Path) -> Studio:
    return open_studio(base, lora_folder=str(folder), embedding_folder=str(folder / "words"), adapters_kept=2)


def refused(studio: Studio, asked: Parameters) -> FaultData:
    """What the picture is refused with, nothing being computed."""
    rows: list[Any] = []
    handle = studio.denoiser.register_forward_pre_hook(lambda *_: rows.append(1))
    try:
        with pytest.raises(Fault) as raised:
            studio.paint_one(asked)
    finally:
        handle.remove()
    assert rows == []
    return raised.value.data


class TestLoras:
    def test_kohyas_and_diffusers_files_of_one_lora_paint_the_same(
        self, studio: Studio, folder: Path, lora: Path
    ) -> None:
        (folder / "plain.safetensors").write_bytes(lora.read_bytes())
        tiny_adapters.make_kohya_lora(lora, folder / "v1.5 (kohya).safetensors")
        one = studio.paint_one(parameters(loras=(Lora("plain", 0.5),)))
        other = studio.paint_one(parameters(loras=(Lora("v1.5 (kohya)", 0.5),)))
        assert torch.equal(one, other)
        assert not torch.equal(one, studio.paint_one(parameters()))

    def test_a_file_in_half_precision_computes_as_the_model_does(
        self, studio: Studio, folder: Path, lora: Path, base: Path
    ) -> None:
        tiny_adapters.make_kohya_lora(lora, folder / "full.safetensors")
        halved = {name: value.half() for name, value in load_file(folder / "full.safetensors").items()}
        save_file(halved, folder / "half.safetensors")
        save_file({name: value.float() for name, value in halved.items()}, folder / "full.safetensors")
        asked = [parameters(loras=(Lora(name),)) for name in ("half", "full")]
        assert torch.equal(studio.paint_one(asked[0]), studio.paint_one(asked[1]))

    def test_the_weight_of_one_named_twice_adds_up_and_nought_is_none(
        self, studio: Studio, folder: Path, lora: Path
    ) -> None:
        (folder / "a.safetensors").write_bytes(lora.read_bytes())
        twice = studio.paint_one(parameters(loras=(Lora("a", 0.25), Lora("a", 0.5))))
        assert torch.equal(twice, studio.paint_one(parameters(loras=(Lora("a", 0.75),))))
        assert torch.equal(studio.paint_one(parameters(loras=(Lora("a", 0.0),))), studio.paint_one(parameters()))

    def test_one_of_another_architecture_says_what_it_is_for(self, studio: Studio, folder: Path) -> None:
        tiny_adapters.make_foreign_lora(folder / "big.safetensors")
        fault = refused(studio, parameters(loras=(Lora("big"),)))
        assert (fault.kind, fault.reason, fault.fields[0].field) == (
            Kind.INVALID_ARGUMENT,
            "LORA_UNFIT",
            "loras[0].name",
        )
        for said in ("big", MODEL, "text_encoder_2", "Stable Diffusion XL", "2048"):
            assert said in fault.message

    def test_one_of_other_widths_says_which(self, studio: Studio, folder: Path, lora: Path) -> None:
        tensors = load_file(lora)
        name = next(name for name in tensors if "attn2.to_k.lora_A" in name)
        tensors[name] = torch.zeros(4, 768)
        save_file(tensors, folder / "wide.safetensors")
        fault = refused(studio, parameters(loras=(Lora("wide"),)))
        assert "takes in 768 numbers there and 32 in this model" in fault.message
        assert "Stable Diffusion 1" in fault.message

    def test_one_from_the_prompt_names_the_prompt(self, studio: Studio, folder: Path) -> None:
        tiny_adapters.make_foreign_lora(folder / "big.safetensors")
        asked = parameters(prompt="panda", prompt_template="panda <lora:big:0.5>", loras=(Lora("big", 0.5),))
        assert refused(studio, asked).fields[0].field == "prompt"

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b"", "not a whole safetensors file"),
            (b"\x80\x04\x95pickle of something", "not a whole safetensors file"),
            (b"\xff" * 64, "not a whole safetensors file"),
        ],
    )
    def test_what_is_no_safetensors_file_is_refused(
        self, studio: Studio, folder: Path, content: bytes, says: str
    ) -> None:
        (folder / "odd.safetensors").write_bytes(content)
        fault = refused(studio, parameters(loras=(Lora("odd"),)))
        assert (fault.kind, fault.reason) == (Kind.FAILED_PRECONDITION, "LORA_UNUSABLE")
        assert says in fault.message
        assert str(folder) not in fault.message

    def test_a_truncated_file_is_refused_and_a_mended_one_taken(self, studio: Studio, folder: Path, lora: Path) -> None:
        (folder / "a.safetensors").write_bytes(lora.read_bytes())
        tiny_adapters.damage(folder / "a.safetensors")
        assert "not a whole safetensors file" in refused(studio, parameters(loras=(Lora("a"),))).message
        (folder / "a.safetensors").write_bytes(lora.read_bytes())
        assert not torch.equal(studio.paint_one(parameters(loras=(Lora("a"),))), studio.paint_one(parameters()))

    @pytest.mark.parametrize(
        ("key", "says"),
        [
            ("unet.conv_in.hada_w1_a", "LoHa"),
            ("lora_unet_conv_in.dora_scale", "DoRA"),
            ("unet.mid_block.attentions.0.proj_in.weight", "does not take for a weight of a LoRA layer"),
        ],
    )
    def test_other_kinds_of_adapters_are_refused(self, studio: Studio, folder: Path, key: str, says: str) -> None:
        save_file({key: torch.zeros(4, 4)}, folder / "kind.safetensors")
        message = refused(studio, parameters(loras=(Lora("kind"),))).message
        assert says in message or "does not know its layers" in message

    def test_a_pickle_is_refused(self, base: Path, folder: Path) -> None:
        torch.save({"a": torch.zeros(1)}, folder / "pickled.pt")
        studio = open_studio(base, loras={"p": {"source": str(folder / "pickled.pt")}})
        assert "pickled weights can run code" in refused(studio, parameters(loras=(Lora("p"),))).message

    def test_an_unknown_one_is_not_found_with_those_there_are(self, studio: Studio, folder: Path, lora: Path) -> None:
        (folder / "here.safetensors").write_bytes(lora.read_bytes())
        fault = refused(studio, parameters(loras=(Lora("../here"),)))
        assert (fault.kind, fault.reason) == (Kind.NOT_FOUND, "LORA_NOT_FOUND")
        assert "here are: here" in fault.message

    def test_a_refused_one_leaves_the_model_as_it_was(self, studio: Studio, folder: Path, base: Path) -> None:
        tiny_adapters.make_foreign_lora(folder / "big.safetensors")
        refused(studio, parameters(loras=(Lora("big"),)))
        plain = call(tiny_adapters.open_pipeline(base), parameters())
        assert torch.equal(studio.paint_one(parameters()), plain)

    def test_transformers_take_loras_too(self, tmp_path: Path) -> None:
        place = tiny_diffusion.make_flow_folder(tmp_path / "flow")
        absent = dict.fromkeys(("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor"))
        pipeline = StableDiffusion3Pipeline.from_pretrained(place, **absent)
        pipeline.transformer.add_adapter(
            LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q"])
        )
        layers = get_peft_model_state_dict(pipeline.transformer)
        StableDiffusion3Pipeline.save_lora_weights(tmp_path / "lora", transformer_lora_layers=layers)
        expected = _sd3(pipeline)
        fresh = StableDiffusion3Pipeline.from_pretrained(place, **absent)
        plain = _sd3(fresh)
        model = _Model(fresh, fresh.transformer)
        adapters = Adapters(model, open_settings(loras={"a": {"source": str(tmp_path / "lora")}}))
        held = adapters.hold(parameters(loras=(Lora("a"),)))
        adapters.switch.to(held.overlay)
        assert torch.equal(_sd3(fresh), expected)
        adapters.switch.to(None)
        assert torch.equal(_sd3(fresh), plain)
        assert not torch.equal(plain, expected)
        with pytest.raises(Fault, match="freeu: .* has no U-Net"):
            adapters.hold(parameters(freeu=FreeU()))


class TestMemory:
    def test_the_least_recently_used_is_dropped(self, studio: Studio, folder: Path, lora: Path) -> None:
        for name in "abc":
            (folder / f"{name}.safetensors").write_bytes(lora.read_bytes())
        for name in "abac":
            studio.adapters.hold(parameters(loras=(Lora(name),)))
        assert studio.adapters.kept == (("lora", "a"), ("lora", "c"))

    def test_never_one_that_a_picture_under_way_uses(self, studio: Studio, folder: Path, lora: Path) -> None:
        for name in "abcd":
            (folder / f"{name}.safetensors").write_bytes(lora.read_bytes())
        under_way = [studio.adapters.hold(parameters(loras=(Lora("a"), Lora("b"))))]
        under_way.append(studio.adapters.hold(parameters(loras=(Lora("c"),)), under_way=under_way))
        assert {name for _, name in studio.adapters.kept} == {"a", "b", "c"}
        studio.adapters.hold(parameters(loras=(Lora("d"),)))
        assert len(studio.adapters.kept) == 2

    def test_a_file_written_anew_is_read_anew_once_nobody_uses_the_old(
        self, studio: Studio, folder: Path, lora: Path, base: Path
    ) -> None:
        file = folder / "a.safetensors"
        file.write_bytes(lora.read_bytes())
        asked = parameters(loras=(Lora("a"),))
        old = studio.paint_one(asked)
        held = studio.adapters.hold(asked)
        save_file({name: value * 0.5 for name, value in load_file(lora).items()}, file)
        os.utime(file, ns=(1, 1))
        again = studio.adapters.hold(asked, under_way=[held])
        assert again.overlay is not None
        assert held.overlay is not None
        assert again.overlay.loras == held.overlay.loras
        assert not torch.equal(studio.paint_one(asked), old)

    def test_a_model_that_nobody_holds_is_let_go(self, base: Path) -> None:
        model = _Model(*(lambda pipeline: (pipeline, pipeline.unet))(tiny_adapters.open_pipeline(base)))
        kept = weakref.WeakKeyDictionary({model: Adapters(model, open_settings())})
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None
        assert not kept


class TestEmbeddings:
    @pytest.fixture
    def words(self, folder: Path) -> Path:
        place = folder / "words"
        place.mkdir()
        tiny_adapters.make_embedding(place / "an.safetensors", count=2)
        tiny_adapters.make_embedding(place / "easy_negative-2.safetensors", count=1, seed=2, key="<other>")
        return place

    def test_a_word_is_read_as_its_vectors(self, studio: Studio, words: Path, base: Path) -> None:
        pipeline = tiny_adapters.open_pipeline(base)
        pipeline.load_textual_inversion(load_file(words / "an.safetensors"), token="qqan")
        expected = call(pipeline, parameters(), prompt="red qqan panda")
        for prompt in ("red an panda", "red embedding:an panda", "red AN panda"):
            assert torch.equal(studio.paint_one(parameters(prompt=prompt)), expected), prompt

    def test_prompts_without_the_word_are_read_as_ever(self, studio: Studio, words: Path, base: Path) -> None:
        studio.paint_one(parameters(prompt="an easy_negative-2"))
        fresh = tiny_adapters.open_pipeline(base)
        for prompt in ("red panda", "an-ti", "Xan", "an_1", "easy_negative-22", ""):
            assert torch.equal(studio.paint_one(parameters(prompt=prompt)), call(fresh, parameters(), prompt=prompt))

    def test_plain_syntax_has_no_embeddings(self, studio: Studio, words: Path, base: Path) -> None:
        asked = parameters(prompt="an", prompt_syntax="plain")
        assert torch.equal(studio.paint_one(asked), call(tiny_adapters.open_pipeline(base), asked))

    def test_one_dropped_and_read_again_paints_the_same(self, studio: Studio, words: Path) -> None:
        for i in range(2):
            tiny_adapters.make_embedding(words / f"more{i}.safetensors", count=3, seed=i)
        first = studio.paint_one(parameters(prompt="an apple"))
        for i in range(2):
            studio.paint_one(parameters(prompt=f"more{i}"))
        assert ("embedding", "an") not in studio.adapters.kept
        assert torch.equal(studio.paint_one(parameters(prompt="an apple")), first)

    def test_what_a_tokenizer_gives_back_is_readable(self, studio: Studio, words: Path) -> None:
        held = studio.adapters.hold(parameters(prompt="an ox"))
        tokenizer = studio.pipeline.tokenizer
        prompt = held.prompt("an ox")
        assert re.fullmatch(r"[0-9a-z]+ [0-9a-z]+ ox", prompt)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert len(ids) == 4  # two vectors and two letters
        assert held.readable(tokenizer.decode(ids)).split() == ["an", "ox"]

    def test_one_of_another_width_says_which(self, studio: Studio, words: Path) -> None:
        tiny_adapters.make_embedding(words / "wide.safetensors", width=768)
        fault = refused(studio, parameters(negative_prompt="wide"))
        assert (fault.reason, fault.fields[0].field) == ("EMBEDDING_UNFIT", "negative_prompt")
        assert "768 wide; this model's text encoders take 32" in fault.message

    def test_other_files_are_refused(self, studio: Studio, words: Path, lora: Path) -> None:
        (words / "lora.safetensors").write_bytes(lora.read_bytes())
        assert "it is no embedding" in refused(studio, parameters(prompt="lora")).message

    def test_of_a_model_with_two_text_encoders_both_are_told(self, tmp_path: Path) -> None:
        place = diffusion_families.make_sdxl(tmp_path / "sdxl")
        torch.manual_seed(5)
        widths = diffusion_families.CLIP_WIDTH, diffusion_families.BIG_CLIP_WIDTH
        tables = {name: torch.randn(2, width) for name, width in zip(("clip_l", "clip_g"), widths, strict=True)}
        save_file(tables, tmp_path / "both.safetensors")
        by_hand = StableDiffusionXLPipeline.from_pretrained(place)
        for name, suffix in (("clip_l", ""), ("clip_g", "_2")):
            # Diffusers' own way reads the end of the text wrongly for encoders of old configs; these have a new one.
            by_hand.load_textual_inversion(
                {"x": tables[name]},
                token="qqboth",
                tokenizer=getattr(by_hand, f"tokenizer{suffix}"),
                text_encoder=getattr(by_hand, f"text_encoder{suffix}"),
            )
        for encoder in (by_hand.text_encoder, by_hand.text_encoder_2.text_model):
            encoder.eos_token_id = by_hand.tokenizer.eos_token_id
        pipeline = StableDiffusionXLPipeline.from_pretrained(place)
        before = pipeline.encode_prompt("a cat")
        rows = {"both": {"source": str(tmp_path / "both.safetensors")}}
        adapters = Adapters(_Model(pipeline, pipeline.unet), open_settings(embeddings=rows))
        held = adapters.hold(parameters(prompt="both cat"))
        for ours, theirs in zip(
            pipeline.encode_prompt(held.prompt("both cat")), by_hand.encode_prompt("qqboth cat"), strict=True
        ):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(pipeline.encode_prompt("a cat"), before, strict=True):
            assert torch.equal(ours, theirs)


class TestImagePrompts:
    @pytest.fixture
    def rows(self, folder: Path, base: Path) -> dict[str, Any]:
        tiny_adapters.make_ip_adapter(base, folder / "ip.safetensors", 1)
        encoder = tiny_adapters.make_image_encoder(folder / "encoder")
        return {"ip": {"source": str(folder / "ip.safetensors"), "image_encoder": str(encoder)}}

    def refusal(self, base: Path, rows: dict[str, Any]) -> FaultData:
        return refused(
            open_studio(base, image_prompt_adapters=rows), parameters(image_prompts=(ImagePrompt("ip", ""),))
        )

    def test_one_of_another_width_says_which(self, base: Path, folder: Path, rows: dict[str, Any]) -> None:
        tiny_adapters.make_ip_adapter(base, folder / "ip.safetensors", 1, width=768)
        fault = self.refusal(base, rows)
        assert (fault.reason, fault.fields[0].field) == ("ADAPTER_UNFIT", "image_prompts[0].adapter")
        assert "768" in fault.message

    def test_another_image_encoder_than_its_own_is_refused(
        self, base: Path, folder: Path, rows: dict[str, Any]
    ) -> None:
        tiny_adapters.make_ip_adapter(base, folder / "ip.safetensors", 1, projection=48)
        assert "projection_dim 48; the one set for it has 24" in self.refusal(base, rows).message

    def test_a_damaged_file_or_encoder_is_refused(self, base: Path, folder: Path, rows: dict[str, Any]) -> None:
        good = (folder / "ip.safetensors").read_bytes()
        tiny_adapters.damage(folder / "ip.safetensors")
        assert "not a whole safetensors file" in self.refusal(base, rows).message
        (folder / "ip.safetensors").write_bytes(good)
        tiny_adapters.damage(folder / "encoder" / "model.safetensors")
        assert "image encoder" in self.refusal(base, rows).message
        (folder / "encoder" / "config.json").unlink()
        assert "image encoder encoder is not a model folder" in self.refusal(base, rows).message

    def test_a_lora_is_no_ip_adapter(self, base: Path, lora: Path, rows: dict[str, Any]) -> None:
        fault = self.refusal(base, {"ip": {**rows["ip"], "source": str(lora)}})
        assert "it is no IP-Adapter" in fault.message


class _Model:
    """The parts of a LoadedModel that adapters look at."""

    def __init__(self, pipeline: Any, denoiser: Any) -> None:
        self.name = MODEL
        self.pipeline = pipeline
        self.denoiser = denoiser
        pipeline.set_progress_bar_config(disable=True)


def open_settings(**given: Any) -> Settings:
    """Settings of adapters alone."""
    return Settings.model_validate({"loras": {}, "controls": {}, **given})


def _sd3(pipeline: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        images: torch.Tensor = pipeline(
            "red panda", num_inference_steps=2, height=32, width=32, generator=generator, output_type="pt"
        ).images
    return images
