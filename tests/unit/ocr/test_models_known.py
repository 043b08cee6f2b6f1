"""Which models there are, what they declare, which one leaves, and whose step is next."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from services.kit.engine_api import JobEvent
from services.ocr import catalog, languages
from services.ocr.engine import memory
from services.ocr.engine.turns import Turns
from services.ocr.languages import Speaker
from services.ocr.settings import Settings

# --- the catalogue ---


def model_folder(root: Path, name: str, card: str = "") -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text(card)
    return folder


def test_the_model_folder_is_looked_at_anew_each_time(tmp_path: Path) -> None:
    settings = Settings(models={"mine": "/somewhere"}, model_folder=str(tmp_path))
    assert set(catalog.known_models(settings)) == {"mine"}
    for name in ("one", ".hidden", "two words", "mine"):
        model_folder(tmp_path, name)
    (tmp_path / "empty").mkdir()
    known = catalog.known_models(settings)
    assert set(known) == {"mine", "one"}
    assert known["mine"].source == "/somewhere"
    assert known["one"].source == str(tmp_path / "one")


def test_a_model_folder_that_went_away_takes_nothing_else_with_it(tmp_path: Path) -> None:
    settings = Settings(models={"mine": "/somewhere"}, model_folder=str(tmp_path))
    tmp_path.rmdir()
    assert set(catalog.known_models(settings)) == {"mine"}


@pytest.mark.parametrize(
    ("card", "languages"),
    [
        ("---\nlanguage: fr\n---\ntext", ("fr",)),
        ("---\nlicense: mit\nlanguage:\n- fr\n- no\n- uk-UA\n- fr\n---\n", ("fr", "no", "uk-UA")),
        ("---\nlanguage: [multilingual, not a tag, 7]\n---\n", ()),
        ("---\nlanguage: {fr: 1}\n---\n", ()),
        ("---\nlanguage: [\n---\n", ()),
        ("# no front matter\nlanguage: fr\n", ()),
        ("---\nnever closed\nlanguage: fr\n", ()),
        ("", ()),
    ],
)
def test_languages_come_from_the_cards_front_matter(tmp_path: Path, card: str, languages: tuple[str, ...]) -> None:
    assert catalog.card_languages(model_folder(tmp_path, "m", card)) == languages


def test_the_embedded_model_declares_its_languages() -> None:
    (folder,) = Settings().models.values()
    assert set(catalog.card_languages(Path(folder))) >= {"de", "en", "fr"}


def test_settings_that_cannot_be_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="not a BCP 47 language tag"):
        Settings(languages={"mine": ["not a tag"]})
    with pytest.raises(ValidationError, match="there is no folder"):
        Settings(model_folder=str(tmp_path / "nowhere"))
    with pytest.raises(ValidationError, match="precision"):
        Settings(precision="float8")


# --- languages ---


@pytest.mark.parametrize(
    "tag", ["de", "DE", "uk-UA", "sr-Latn-RS", "de-CH-1996", "es-419", "x-private", "gsw", "zh-yue"]
)
def test_tags_of_all_forms_are_taken(tag: str) -> None:
    assert languages.is_tag(tag)


@pytest.mark.parametrize("tag", ["", "d", "deutsch language", "de_DE", "fr-", "-fr", "1a", "de-" + "a" * 40, "é"])
def test_what_is_no_tag_is_not(tag: str) -> None:
    assert not languages.is_tag(tag)


def speaker(name: str, *tags: str, loaded: bool = False, default: bool = False) -> Speaker:
    return Speaker(name, tags, loaded, default)


def test_the_first_hint_that_someone_declares_decides() -> None:
    models = [speaker("a", "en", default=True, loaded=True), speaker("b", "fr"), speaker("c", "fr-CA", "pl")]
    assert languages.choose(["ja", "pl", "en"], models) == "c"
    assert languages.choose(["fr-ca"], models) == "c"  # the very tag
    assert languages.choose(["fr-BE"], models) == "b"  # the same language
    assert languages.choose(["ja"], models) is None
    assert languages.known(models) == ["en", "fr", "fr-CA", "pl"]


def test_among_equals_a_loaded_model_is_taken_then_the_default() -> None:
    assert languages.choose(["fr"], [speaker("a", "fr"), speaker("b", "fr", loaded=True)]) == "b"
    assert languages.choose(["fr"], [speaker("a", "fr"), speaker("b", "fr", default=True)]) == "b"
    assert languages.choose(["fr"], [speaker("a", "fr"), speaker("b", "fr")]) == "a"


# --- memory ---


def test_weights_take_less_in_half_precision() -> None:
    assert [memory.needed_bytes(100, p) for p in ("float32", "bfloat16", "float16", "int8_dynamic")] == [
        400,
        200,
        200,
        400,
    ]


# --- turns ---


class Worker:
    def __init__(self, clock: list[float], seconds: float) -> None:
        self.clock, self.seconds, self.worked = clock, seconds, 0.0

    def step(self) -> list[JobEvent]:
        self.clock[0] += self.seconds
        self.worked += self.seconds
        return []


def test_long_steps_and_short_ones_get_the_same_time() -> None:
    clock = [0.0]
    turns = Turns(lambda: clock[0])
    page, lane = Worker(clock, 1.0), Worker(clock, 0.01)
    for _ in range(500):
        turns.step([page, lane])
    assert page.worked == pytest.approx(lane.worked, abs=1.01)


def test_a_rest_saves_no_time_up() -> None:
    clock = [0.0]
    turns = Turns(lambda: clock[0])
    first, second = Worker(clock, 1.0), Worker(clock, 1.0)
    for _ in range(50):
        turns.step([first])
    for _ in range(10):
        turns.step([first, second])
    assert (first.worked, second.worked) == (55.0, 5.0)
