"""Styles are laid on the prompts before all else, out of the file as it is now."""

import os
from pathlib import Path

import pytest

from services.diffusion.domain import Lora
from services.diffusion.prompts import styles
from services.diffusion.prompts.resolve import Resolved, resolve
from services.diffusion.settings import Settings
from services.kit.faults import Fault, Kind

TABLE = """name,prompt,negative_prompt
watercolour,"a watercolour of {prompt}, wet paper",photo
sharp,"(sharp:1.2), detailed",blurry
empty,,
-- more --,,
twice,{prompt} and {prompt},
inked,"ink <lora:inks:0.5>",
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "styles.csv"
    path.write_text(TABLE, encoding="utf-8-sig")
    return path


def laid_on(
    file: Path | str, names: tuple[str, ...], prompt: str = "panda", negative: str = "", syntax: str = "weighted"
) -> Resolved:
    return resolve(prompt, negative, names, syntax, 1, Settings(styles_file=str(file)))  # type: ignore[arg-type]


def test_a_style_surrounds_the_prompt_or_follows_it(file: Path) -> None:
    result = laid_on(file, ("watercolour", "sharp"), negative="ugly")
    assert result.prompt == "a watercolour of panda, wet paper, (sharp:1.2), detailed"
    assert result.negative_prompt == "ugly, photo, blurry"
    assert (result.prompt_template, result.negative_prompt_template) == ("panda", "ugly")
    assert laid_on(file, ("sharp",), prompt="").prompt == "(sharp:1.2), detailed"


def test_an_empty_style_changes_nothing(file: Path) -> None:
    result = laid_on(file, ("empty",))
    assert (result.prompt, result.prompt_template, result.violations) == ("panda", "", ())


def test_a_style_may_bring_a_lora(file: Path) -> None:
    result = laid_on(file, ("inked",))
    assert (result.prompt, result.loras) == ("panda, ink", (Lora("inks", 0.5),))
    assert laid_on(file, ("inked",), syntax="plain").prompt == "panda, ink <lora:inks:0.5>"


def test_an_unknown_style_is_told_with_those_there_are(file: Path) -> None:
    with pytest.raises(Fault) as caught:
        laid_on(file, ("sharp", "blunt"))
    assert caught.value.data.kind is Kind.NOT_FOUND
    assert caught.value.data.fields[0].field == "styles[1]"
    assert "watercolour" in caught.value.data.message


def test_without_a_file_the_setting_is_named() -> None:
    with pytest.raises(Fault, match="INKWELL_DIFFUSION_STYLES_FILE") as caught:
        laid_on("", ("sharp",))
    assert caught.value.data.kind is Kind.INVALID_ARGUMENT
    assert laid_on("", ()).prompt == "panda"


def test_too_many_and_too_large_are_refused(file: Path) -> None:
    with pytest.raises(Fault, match="17 are more than the limit of 16"):
        laid_on(file, ("sharp",) * 17)
    (violation,) = laid_on(file, ("twice",) * 16).violations
    assert violation.field == "prompt"
    assert "limit of 8192" in violation.description


def test_a_changed_file_is_read_anew(file: Path) -> None:
    assert set(styles.load(str(file))) == {"watercolour", "sharp", "empty", "-- more --", "twice", "inked"}
    before = file.stat()
    file.write_text(TABLE.replace("wet paper", "dry paper"), encoding="utf-8-sig")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert "dry paper" in laid_on(file, ("watercolour",)).prompt


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"name,text\nsharp,x\n", "lacks the columns prompt, negative_prompt"),
        (b"", "lacks the columns"),
        (b'name,prompt,negative_prompt\nsharp,"never closed\n', "is not CSV"),
        (b"name,prompt,negative_prompt\nsharp,\xff,\n", "is not UTF-8"),
    ],
)
def test_a_file_that_is_no_such_table_is_told(file: Path, content: bytes, what: str) -> None:
    file.write_bytes(content)
    with pytest.raises(Fault, match=what) as caught:
        laid_on(file, ("sharp",))
    assert caught.value.data.kind is Kind.FAILED_PRECONDITION
    assert "INKWELL_DIFFUSION_STYLES_FILE" in caught.value.data.message


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(Fault, match="cannot be read") as caught:
        laid_on(tmp_path / "none.csv", ("sharp",))
    assert caught.value.data.reason == "STYLES_FILE_UNUSABLE"


def test_every_wrong_prompt_is_told_at_once(file: Path) -> None:
    result = laid_on(file, (), prompt="(panda", negative="[a:b:c] <lora:x:1>")
    assert [violation.field for violation in result.violations] == ["prompt", "negative_prompt"]
    (violation,) = laid_on(file, (), negative="ugly <lora:x:1>").violations
    assert (violation.field, "belong into the prompt" in violation.description) == ("negative_prompt", True)


def test_sub_prompts_are_counted_for_the_cost(file: Path) -> None:
    assert laid_on(file, (), prompt="a cat AND a dog", negative="ugly AND bad").branch_count == 2
    assert laid_on(file, (), prompt="a cat AND a dog", syntax="plain").branch_count == 1
