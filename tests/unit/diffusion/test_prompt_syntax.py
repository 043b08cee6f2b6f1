"""Prompts mean what they mean in AUTOMATIC1111's web UI, and what cannot be read is refused with its place."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.diffusion.domain import Lora
from services.diffusion.prompts.syntax import (
    ALTERNATIVES_MOST,
    BRANCHES_MOST,
    CHUNKS_MOST,
    NESTING_MOST,
    Branch,
    Fragment,
    Prompt,
    PromptError,
    parse,
    take_loras,
)


def only(prompt: Prompt, step: int = 0, step_count: int = 10) -> Branch:
    (branch,) = prompt.at(step, step_count)
    return branch


def fragments(text: str) -> list[tuple[str, float]]:
    (chunk,) = only(parse(text)).chunks
    return [(fragment.text, round(fragment.weight, 6)) for fragment in chunk]


def words(text: str, step_count: int = 10) -> list[str]:
    return [only(parse(text), step, step_count).text for step in range(step_count)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a (red) panda", [("a ", 1.0), ("red", 1.1), (" panda", 1.0)]),
        ("((red)) panda", [("red", 1.21), (" panda", 1.0)]),
        ("[red] panda", [("red", 0.909091), (" panda", 1.0)]),
        ("(red:1.5)(, big : 0.5 )", [("red", 1.5), (", big ", 0.5)]),
        ("(a (red:1.5) panda:0.8)", [("a ", 0.8), ("red", 1.2), (" panda", 0.8)]),
        ("(red:-1)", [("red", -1.0)]),
        ("(red:.5)", [("red", 0.5)]),
        ("([red])", [("red", 1.0)]),
        # A colon that no number follows is a character, and only the last number is the weight.
        ("(note: red)", [("note: red", 1.1)]),
        ("(4:3:1.2)", [("4:3", 1.2)]),
        ("[style: noir]", [("style: noir", 0.909091)]),
        ("(a|b)", [("a|b", 1.1)]),
        # Words of equal weight stay together, so that they are read as one text.
        ("a [] b", [("a  b", 1.0)]),
        (r"\(red\) \[x\] \\ a\:b \|", [(r"(red) [x] \ a:b |", 1.0)]),
        (r"(smile \:\):1.3)", [("smile :)", 1.3)]),
        (r"c:\fonts", [(r"c:\fonts", 1.0)]),
    ],
)
def test_weights_and_escapes(text: str, expected: list[tuple[str, float]]) -> None:
    assert fragments(text) == expected


def test_a_closing_bracket_without_an_opening_one_is_text() -> None:
    assert fragments("smiling :) (very)") == [("smiling :) ", 1.0), ("very", 1.1)]
    assert fragments("(a] b)") == [("a] b", 1.1)]


@pytest.mark.parametrize(
    ("text", "first_after"),
    [("[cat:dog:0.5]", 5), ("[cat:dog:.25]", 2), ("[cat:dog:3]", 3), ("[cat:dog:0]", 0), ("[cat: dog : 1.0 ]", 10)],
)
def test_editing_changes_at_a_part_of_the_steps_or_at_a_step(text: str, first_after: int) -> None:
    assert words(text) == ["cat"] * first_after + ["dog"] * (10 - first_after)


def test_editing_may_add_or_take_away() -> None:
    assert words("a [furry:0.5] cat", 2) == ["a  cat", "a furry cat"]
    assert words("a [furry::0.5] cat", 2) == ["a furry cat", "a  cat"]
    assert words("[cat:dog:500]", 3) == ["cat", "cat", "cat"], "a step beyond the last never comes"
    assert words("[cat:dog:" + "9" * 5000 + "]", 2) == ["cat", "cat"]


def test_alternatives_take_turns_step_by_step() -> None:
    assert words("[cat|dog|] here", 5) == ["cat here", "dog here", "here", "cat here", "dog here"]
    assert words("[1:2|b]", 2) == ["1:2", "b"]


def test_all_of_it_nests() -> None:
    prompt = parse("([a (big:2) cat:[dog|wolf]:2]:0.5)")
    shown = [[(f.text, f.weight) for f in only(prompt, step).chunks[0]] for step in range(4)]
    assert shown == [
        [("a ", 0.5), ("big", 1.0), (" cat", 0.5)],
        [("a ", 0.5), ("big", 1.0), (" cat", 0.5)],
        [("dog", 0.5)],
        [("wolf", 0.5)],
    ]
    assert prompt.switches(4) == (2, 3)
    assert parse("a (cat)").switches(4) == ()


def test_break_begins_a_chunk_also_within_brackets() -> None:
    assert only(parse("red BREAK BREAK panda BREAK")).chunks == ((Fragment("red"),), (), (Fragment("panda"),))
    assert only(parse("(red BREAK panda:1.5)")).chunks == ((Fragment("red", 1.5),), (Fragment("panda", 1.5),))
    assert only(parse("BREAKFAST")).chunks == ((Fragment("BREAKFAST"),),)


def test_and_divides_into_weighted_sub_prompts() -> None:
    prompt = parse("a cat :0.7 AND (a dog:1.2) AND a\n4:3 frame AND fog : -0.5")
    assert [(branch.text, branch.weight) for branch in prompt.at(0, 1)] == [
        ("a cat", 0.7),
        ("a dog", 1.0),
        ("a\n4:3 frame", 1.0),
        ("fog", -0.5),
    ]
    assert prompt.branch_count == 4
    assert parse("BRAND new 4:3").branch_count == 1
    assert only(parse("ugly AND bad", divided=False)).text == "ugly AND bad"


def test_plain_means_that_a_pipeline_may_have_the_text_as_it_is() -> None:
    for text in ("", "red panda, 4:3 :)", "  two\nlines ", "<3", "a|b"):
        assert parse(text).is_plain, text
    for text in ("(red)", "[a|b]", r"\(red\)", "a BREAK b", "a AND b", "a []"):
        assert not parse(text).is_plain, text
    assert Prompt.literal("((a AND [b").is_plain


@pytest.mark.parametrize(
    ("text", "what", "place"),
    [
        ("a (red panda", r'the "(" is never closed', 3),
        ("a [red (panda)", 'the "[" is never closed', 3),
        ("(a [b) c]", 'the "[" is not closed before the ")"', 4),
        ("((((", "never closed", 4),
        ("[]", "no words", None),
        ("()", "no words", None),
        (")](( ))", "no words", None),
        ("[:|]()", "no words", None),
        ("BREAK", "no words", None),
        ("a AND ", "sub-prompt 2 of AND has no words", None),
        ("(a AND b)", "AND divides the whole prompt", 4),
        ("(red:1,5)", "'1,5' after the colon is not a number", 1),
        ("(red:1.2.3)", "not a number", 1),
        ("(red:nan)", "not a number", 1),
        ("(red:1e5)", "not a number", 1),
        ("(red:)", "no number after its last colon", 1),
        ("(red:11)", "accepted: -10 to 10", 1),
        ("x (red:-10.5)", "accepted: -10 to 10", 3),
        ("(red:" + "9" * 400 + ")", "accepted: -10 to 10", 1),
        ("((red:5):5)", "words of weight 25", 2),
        ("cat :12 AND dog", "a sub-prompt of weight 12", None),
        ("[red:1.5]", "'1.5' is no time of a change", 1),
        ("[a:b:-1]", "no time of a change", 1),
        ("[a:b:c]", "several colons", 1),
        ("[a:b:c:0.5]", "several colons", 1),
        ("(" * (NESTING_MOST + 1) + "a" + ")" * (NESTING_MOST + 1), f"more than {NESTING_MOST} deep", NESTING_MOST + 1),
        ("[" + "a|" * ALTERNATIVES_MOST + "a]", f"{ALTERNATIVES_MOST + 1} alternatives", 1),
        (" AND ".join(["a"] * (BRANCHES_MOST + 1)), f"more than {BRANCHES_MOST} sub-prompts", None),
        (" BREAK ".join(["a"] * (CHUNKS_MOST + 1)), f"more than {CHUNKS_MOST - 1} BREAKs", None),
    ],
)
def test_what_cannot_be_read_is_told_with_its_place(text: str, what: str, place: int | None) -> None:
    with pytest.raises(PromptError) as caught:
        parse(text)
    assert what in str(caught.value)
    if place is not None:
        assert f"(at character {place})" in str(caught.value)


def test_what_is_just_within_the_limits_is_read() -> None:
    assert len(fragments("(" * NESTING_MOST + "a" + ")" * NESTING_MOST)) == 1
    assert only(parse("[" + "a|" * (ALTERNATIVES_MOST - 1) + "b]"), ALTERNATIVES_MOST - 1, 100).text == "b"
    assert parse(" AND ".join(["a"] * BRANCHES_MOST)).branch_count == BRANCHES_MOST
    assert len(only(parse(" BREAK ".join(["a"] * CHUNKS_MOST))).chunks) == CHUNKS_MOST
    assert fragments("(a:10)") == [("a", 10.0)]


def test_loras_are_taken_out() -> None:
    assert take_loras("red panda <lora:fluent:0.8>, big <LORA:My File.v2> x") == (
        "red panda, big x",
        (Lora("fluent", 0.8), Lora("My File.v2", 1.0)),
    )
    assert take_loras("a < b <3 <lora") == ("a < b <3 <lora", ())
    assert take_loras("<lora:a:-4>") == ("", (Lora("a", -4.0),))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("x <lora:fluent:0.8", "never closed"),
        ("x <lora:fluent <lora:b:1>", "never closed"),
        ("x <lora::0.8>", "no name"),
        ("x <lora:fluent:much>", "'much'"),
        ("x <lora:fluent:>", "a number from -4 to 4"),
        ("x <lora:fluent:4.1>", "a number from -4 to 4"),
        ("x <lora:fluent:0.8:0.5>", "takes one"),
    ],
)
def test_loras_that_cannot_be_read_are_told(text: str, what: str) -> None:
    with pytest.raises(PromptError, match=what) as caught:
        take_loras(text)
    assert "(at character 3)" in str(caught.value)


pieces = st.sampled_from(
    ["(", ")", "[", "]", ":", "|", "\\", "0.5", "12", "-", " ", "\n", "AND", "BREAK", "<lora:", ">", "cat", "é", "."]
)
prompts = st.lists(pieces | st.text(max_size=3), max_size=60).map("".join)


@given(prompts, st.booleans())
def test_any_text_is_read_or_refused(text: str, divided: bool) -> None:
    try:
        take_loras(text)
        prompt = parse(text, divided=divided)
    except PromptError:
        return
    for step in range(4):
        branches = prompt.at(step, 4)
        assert len(branches) == prompt.branch_count
        assert all(branch.chunks and abs(branch.weight) <= 10 for branch in branches)
        assert all(abs(f.weight) <= 10 and f.text for branch in branches for chunk in branch.chunks for f in chunk)


@given(st.text(alphabet=st.characters(exclude_characters="()[]\\", exclude_categories=["Cs"])))
def test_text_without_brackets_stays_as_it_is(text: str) -> None:
    if "BREAK" in text or "AND" in text:
        return
    prompt = parse(text)
    assert prompt.is_plain
    assert "".join(fragment.text for fragment in only(prompt).chunks[0]) == text


@pytest.mark.parametrize(
    "unit", ["(", "[", ")", "[a", "(a)", "[a|", "[a:", "a:", "\\", " ", "(a:1.1", "1", "[[a]", "<lora:", "AND "]
)
def test_hostile_prompts_take_no_longer_than_others(unit: str) -> None:
    text = (unit * 8192)[:8192]
    began = time.process_time()
    for attempt in (text, "(" + text + ")", "[a:" + text + "]"):
        for read in (parse, take_loras):
            try:
                read(attempt)
            except PromptError:
                continue
    # A quadratic way takes minutes; this is no measurement of speed.
    assert time.process_time() - began < 5
