"""The searches on a toy language small enough to try every text."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ocr.domain import Decoding, EarlyStopping
from services.ocr.engine import search
from services.ocr.engine.search import Candidates

EOS, LETTERS = 0, (1, 2)
VOCABULARY = (EOS, *LETTERS)
LENGTH = 3

# For every text so far, the probability of each next token.
weights = st.lists(st.floats(0.05, 1.0), min_size=3, max_size=3)
PREFIXES = [p for n in range(LENGTH) for p in itertools.product(LETTERS, repeat=n)]
languages = st.lists(weights, min_size=len(PREFIXES), max_size=len(PREFIXES)).map(
    lambda rows: {p: [math.log(w / sum(row)) for w in row] for p, row in zip(PREFIXES, rows, strict=True)}
)
Language = dict[tuple[int, ...], list[float]]


def run(started: search.Search, language: Language) -> list[tuple[tuple[int, ...], float]]:
    while True:
        rows = []
        for beam in started.beams:
            scored = zip(VOCABULARY, language[beam.ids], strict=True)
            ranked = sorted(scored, key=lambda pair: -pair[1])[: started.candidate_count]
            scores = [score for _, score in ranked]
            rows.append(Candidates([token for token, _ in ranked], scores, scores))
        before = started.beams
        parents = started.advance(rows)
        if not parents:
            return [(beam.ids, score) for beam, score in started.results()]
        assert [before[parent].ids for parent in parents] == [beam.ids[:-1] for beam in started.beams]


def every_text(language: Language, penalty: float) -> dict[tuple[int, ...], float]:
    """All texts that end, or are as long as they may be, with their scores."""
    texts = {}
    for prefix in PREFIXES:
        for token in VOCABULARY:
            ids = (*prefix, token)
            if token == EOS or len(ids) == LENGTH:
                total = sum(language[ids[:n]][ids[n]] for n in range(len(ids)))
                texts[ids] = total / len(ids) ** penalty
    return texts


@given(language=languages, penalty=st.sampled_from([-1.0, 0.0, 1.0, 2.5]))
def test_beams_enough_for_every_text_find_the_best_ones_in_order(language: Language, penalty: float) -> None:
    texts = every_text(language, penalty)
    assert len(texts) < 16
    found = run(search.start(Decoding(16, 16, penalty, LENGTH), eos_ids=frozenset([EOS])), language)
    assert len(found) == len(texts)
    assert [score for _, score in found] == pytest.approx(sorted(texts.values(), reverse=True))
    assert all(score == pytest.approx(texts[ids]) for ids, score in found)


@given(language=languages, width=st.integers(2, 5), early=st.sampled_from(["first", "heuristic", "never"]))
def test_a_search_answers_whole_different_texts_best_first(
    language: Language, width: int, early: EarlyStopping
) -> None:
    texts = every_text(language, 1.0)
    found = run(
        search.start(Decoding(width, width, 1.0, LENGTH, early_stopping=early), eos_ids=frozenset([EOS])), language
    )
    assert len({ids for ids, _ in found}) == len(found) == width
    assert [score for _, score in found] == sorted((texts[ids] for ids, _ in found), reverse=True)


@given(language=languages)
def test_greedy_takes_the_likeliest_token_each_time(language: Language) -> None:
    wanted: tuple[int, ...] = ()
    while len(wanted) < LENGTH and EOS not in wanted:
        wanted += (max(VOCABULARY, key=lambda token: language[wanted][token]),)
    ((ids, score),) = run(search.start(Decoding(1, 1, 1.0, LENGTH), eos_ids=frozenset([EOS])), language)
    assert ids == wanted
    assert score == pytest.approx(every_text(language, 1.0)[ids])


def test_a_token_that_is_ruled_out_is_never_taken() -> None:
    started = search.start(Decoding(2, 2, 1.0, LENGTH), eos_ids=frozenset([EOS]))
    rows = [Candidates([1, 2, EOS], [-1.0, -math.inf, -math.inf], [-1.0, -0.5, -0.1])]
    assert started.advance(rows) == [0]
    assert [beam.ids for beam in started.beams] == [(1,)]


def test_a_search_whose_every_token_is_ruled_out_ends_without_a_result() -> None:
    for width in (1, 2):
        started = search.start(Decoding(width, width, 1.0, LENGTH), eos_ids=frozenset([EOS]))
        assert started.advance([Candidates([1, 2, EOS], [-math.inf] * 3, [-1.0] * 3)]) == []
        assert started.results() == []
