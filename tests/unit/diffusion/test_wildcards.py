"""Wildcards are drawn from the folder alone, the same for the same seed, and never without end."""

from pathlib import Path

import pytest

from services.diffusion.domain import Lora
from services.diffusion.prompts import wildcards
from services.diffusion.prompts.resolve import Resolved, resolve
from services.diffusion.settings import Settings
from services.kit.faults import Fault, Kind


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "wildcards"
    (place / "animals").mkdir(parents=True)
    (place / "colour.txt").write_text("# colours\nred\n\n  green \nblue\n")
    (place / "animals" / "bear.txt").write_text("panda\ngrizzly", encoding="utf-8-sig")
    (place / "scene.txt").write_text("a __colour__ __animals/bear__\n")
    (place / "dark mood.txt").write_text("gloomy")
    return place


def resolved(folder: Path | str, prompt: str, seed: int = 1, negative_prompt: str = "") -> Resolved:
    settings = Settings(wildcard_folder=str(folder))
    return resolve(prompt, negative_prompt, (), "weighted", seed, settings)


def filled(folder: Path, prompt: str, seed: int = 1) -> str:
    result = resolved(folder, prompt, seed)
    assert not result.violations
    return result.prompt


def refused(folder: Path | str, prompt: str, seed: int = 1) -> str:
    (violation,) = resolved(folder, prompt, seed).violations
    assert violation.field == "prompt"
    return violation.description


def test_a_line_of_the_file_takes_its_place(folder: Path) -> None:
    drawn = {filled(folder, "a __colour__ car", seed) for seed in range(30)}
    assert drawn == {"a red car", "a green car", "a blue car"}
    assert filled(folder, "__dark mood__ sky") == "gloomy sky"


def test_lines_may_hold_wildcards(folder: Path) -> None:
    drawn = {filled(folder, "__scene__", seed) for seed in range(60)}
    assert drawn == {f"a {colour} {bear}" for colour in ("red", "green", "blue") for bear in ("panda", "grizzly")}


def test_the_seed_alone_decides(folder: Path) -> None:
    prompt = "__colour__, __colour__, __colour__, __animals/bear__"
    # Of random.Random(7) the first numbers are 0.324, 0.151, 0.651, 0.072.
    assert filled(folder, prompt, 7) == "red, red, green, panda"
    assert filled(folder, prompt, 7) == filled(folder, prompt, 7)
    assert len({filled(folder, prompt, seed) for seed in range(20)}) > 5


def test_both_prompts_are_filled_in_and_remembered_as_asked(folder: Path) -> None:
    result = resolved(folder, "a __dark mood__ (sky:1.2)", negative_prompt="__animals/bear__")
    assert result.prompt == "a gloomy (sky:1.2)"
    assert result.negative_prompt in ("panda", "grizzly")
    assert result.prompt_template == "a __dark mood__ (sky:1.2)"
    assert result.negative_prompt_template == "__animals/bear__"
    assert result.wildcards_drawn
    untouched = resolved(folder, "a (sky:1.2)")
    assert (untouched.prompt_template, untouched.wildcards_drawn) == ("", False)


def test_a_drawn_line_may_bring_a_lora(folder: Path) -> None:
    (folder / "style.txt").write_text("flat <lora:fluent:0.8>")
    result = resolved(folder, "panda, __style__")
    assert (result.prompt, result.loras) == ("panda, flat", (Lora("fluent", 0.8),))


def test_a_changed_file_counts_at_once(folder: Path) -> None:
    assert filled(folder, "__dark mood__") == "gloomy"
    (folder / "dark mood.txt").write_text("sombre sky")
    assert filled(folder, "__dark mood__") == "sombre sky"


def test_underscores_are_not_always_wildcards(folder: Path) -> None:
    for text in ("snake_case", "snake__case", "______", "_colour_", "__ colour __"):
        assert filled(folder, text) == text
    plain = resolve("__colour__", "", (), "plain", 1, Settings(wildcard_folder=str(folder)))
    assert (plain.prompt, plain.wildcards_drawn, plain.violations) == ("__colour__", False, ())


def test_an_unknown_wildcard_is_told_with_those_there_are(folder: Path) -> None:
    with pytest.raises(Fault) as caught:
        resolved(folder, "__color__")
    assert caught.value.data.kind is Kind.NOT_FOUND
    assert caught.value.data.fields[0].field == "prompt"
    assert "animals/bear, colour, dark mood, scene" in caught.value.data.message
    with pytest.raises(Fault) as caught:
        resolved(folder, "", negative_prompt="__color__")
    assert caught.value.data.fields[0].field == "negative_prompt"


@pytest.mark.parametrize("name", ["animals/../../secret", "animals/../colour", "colour.txt", "x/.hidden/secret"])
def test_no_name_leads_out_of_the_folder(folder: Path, name: str) -> None:
    (folder.parent / "secret.txt").write_text("hidden")
    (folder / "x" / ".hidden").mkdir(parents=True)
    (folder / "x" / ".hidden" / "secret.txt").write_text("hidden")
    with pytest.raises(Fault) as caught:
        resolved(folder, f"__{name}__")
    assert caught.value.data.kind is Kind.NOT_FOUND
    assert "secret" not in caught.value.data.fields[0].description


def test_what_begins_like_a_path_is_no_wildcard(folder: Path) -> None:
    (folder.parent / "secret.txt").write_text("hidden")
    for text in ("__../secret__", "__/etc/passwd__", "__./colour__"):
        assert filled(folder, text) == text


def test_without_a_folder_the_setting_is_named() -> None:
    assert "INKWELL_DIFFUSION_WILDCARD_FOLDER" in refused("", "a __colour__ car")


def test_a_wildcard_that_leads_back_to_itself_is_refused_whatever_is_drawn(folder: Path) -> None:
    (folder / "egg.txt").write_text("white\n" * 50 + "of a __hen__\n")
    (folder / "hen.txt").write_text("from an __egg__")
    for seed in range(20):
        assert "__egg__ -> __hen__ -> __egg__" in refused(folder, "an __egg__", seed=seed)
    (folder / "self.txt").write_text("__self__")
    (folder / "before.txt").write_text("__self__")
    assert "itself: __self__ -> __self__" in refused(folder, "__before__")


def test_wildcards_that_grow_are_bounded(folder: Path) -> None:
    for depth in range(20):
        (folder / f"chain{depth}.txt").write_text(f"__chain{depth + 1}__")
        (folder / f"twice{depth}.txt").write_text(f"__twice{depth + 1}____twice{depth + 1}__")
    (folder / "chain20.txt").write_text("end")
    (folder / "twice20.txt").write_text("end")
    assert f"more than {wildcards.DEPTH_MOST} deep" in refused(folder, "__chain0__")
    assert filled(folder, "__chain13__") == "end"
    assert f"more than {wildcards.DRAWS_MOST} wildcards" in refused(folder, "__twice14__" * 5)
    (folder / "long.txt").write_text("word " * 500)
    assert "more than the limit of 8192" in refused(folder, "__long__" * 10)


def test_files_that_cannot_be_used_are_told(folder: Path) -> None:
    (folder / "empty.txt").write_text("# nothing\n\n")
    (folder / "latin.txt").write_bytes("grün".encode("latin-1"))
    (folder / "wide.txt").write_text("x" * (wildcards.LINE_CHARACTERS_MOST + 1))
    (folder / "large.txt").write_text("x\n" * (wildcards.FILE_BYTES_MOST // 2 + 1))
    assert "empty has no lines" in refused(folder, "__empty__")
    assert "latin is not UTF-8 (at byte 2)" in refused(folder, "__latin__")
    assert "wide has a line of 4097 characters" in refused(folder, "__wide__")
    assert "large has 1048578 bytes; at most 1048576" in refused(folder, "__large__")
