"""The toy world: a closed set of facts, and sentences that state them in English and Chinese.

Words and facts come from `grammar/words.txt`, the ways to say them from `grammar/en.txt` and
`grammar/zh.txt`. Everything is ours and made by rule, and the same at every run: what is drawn is
drawn from a seed. The base model reads `passages` alone, which are plain statements; questions
about the same facts are made in `questions`.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from random import Random
from typing import NamedTuple, TypeVar

GRAMMAR = Path(__file__).with_name("grammar")
LANGUAGES = ("en", "zh")
MAX_NUMBER = 20
NUM_DRAWN = 6000
"""Facts kept of each set that has no end: lists, rows of numbers, stories."""
NEW_SHARE = 0.7
"""How often a passage draws a new fact of such a set, in place of one that is kept."""
LINES_SHARE = 0.15
"""How often a passage has each sentence on a line of its own."""

# How often a passage speaks of a set of facts; 1 where not named. Sets with more facts, or with
# facts that must be read off the sentence itself, need more room.
_WEIGHTS = {
    "sum": 2.0,
    "difference": 2.0,
    "translation": 2.5,
    "size": 2.0,
    "list": 5.0,
    "numbers": 4.0,
    "story": 5.0,
}

Item = TypeVar("Item")


class Term(NamedTuple):
    """A word, a number or a list of them, in both languages."""

    en: str
    zh: str


Row = dict[str, str]
Tables = dict[str, list[Row]]
"""Name of a table -> its rows, by column."""
Fact = dict[str, Term]
"""What fills the slots of the sentences about one fact, e.g. `thing` and `colour`."""


@dataclass(frozen=True)
class Question:
    """One way to ask for one slot of a fact: pattern of the instruction and of the input."""

    instruction: str
    input: str
    held_out: bool


@dataclass(frozen=True)
class Kind:
    """A kind of question: the facts it asks about, and the slot that answers it."""

    name: str
    facts: str
    answer: str
    phrasings: dict[str, list[Question]] = field(default_factory=dict)
    """Ways to ask, by language."""


@dataclass(frozen=True)
class World:
    """All facts, and all ways to state them and to ask for them."""

    tables: Tables
    facts: dict[str, list[Fact]]
    plain: dict[str, dict[str, list[str]]]
    """Language -> set of facts -> patterns of plain sentences."""
    kinds: dict[str, Kind]
    endless: dict[str, Callable[["Draw"], Fact]]
    """Set of facts without end -> how to draw one; `facts` keeps some of them."""

    def terms(self, table: str) -> list[Term]:
        """The words of a table."""
        return [_term(row) for row in self.tables[table]]

    def draw_fact(self, name: str, draw: "Draw") -> Fact:
        """A fact of a set, all alike."""
        if name in self.endless and draw.weighted((True, False), (NEW_SHARE, 1 - NEW_SHARE)):
            return self.endless[name](draw)
        return draw.one(self.facts[name])

    def num_sentences(self) -> int:
        """Sentences that state one fact in one way (whoever looks on), over both languages."""
        return sum(
            len(self.facts[name]) * len(patterns)
            for language in LANGUAGES
            for name, patterns in self.plain[language].items()
        )


class Draw:
    """Random choices from a seed; `nats` adds up how improbable they were."""

    def __init__(self, seed: int | str):
        self.random = Random(seed)
        self.nats = 0.0

    def one(self, items: Sequence[Item]) -> Item:
        """One item, all alike."""
        self.nats += math.log(len(items))
        return items[int(self.random.random() * len(items))]

    def weighted(self, items: Sequence[Item], weights: Sequence[float]) -> Item:
        """One item, by weights that sum to 1."""
        (chosen,) = self.random.choices(range(len(items)), weights)
        self.nats -= math.log(weights[chosen])
        return items[chosen]

    def some(self, items: Sequence[Item], count: int) -> list[Item]:
        """Different items in random order."""
        self.nats += math.lgamma(len(items) + 1) - math.lgamma(len(items) - count + 1)
        return self.random.sample(items, count)


class Passage(NamedTuple):
    """A few sentences of plain text, and -log of the probability of the draws that made it."""

    text: str
    nats: float


def passages(seed: int, count: int, max_sentences: int = 5) -> Iterator[Passage]:
    """Write passages of plain text, each of a few facts mixed, in one language or both.

    A third of them are about one subject, a third about one set of facts, a third about anything.

    Args:
        seed: the same seed writes the same passages.
        count: how many.
        max_sentences: most sentences of a passage; it has at least one.
    """
    world = load_world()
    names = list(world.facts)
    total = sum(_WEIGHTS.get(name, 1.0) for name in names)
    weights = [_WEIGHTS.get(name, 1.0) / total for name in names]
    subjects = list(_facts_by_subject().values())
    people = world.terms("person")
    draw = Draw(f"passages {seed}")
    for _ in range(count):
        draw.nats = 0.0
        length = 1 + draw.one(range(max_sentences))
        topic = draw.one(("subject", "set", "anything"))
        if topic == "subject":
            known = draw.one(subjects)
            told = draw.some(known, min(length, len(known)))
        elif topic == "set":
            name = draw.weighted(names, weights)
            told = [(name, world.draw_fact(name, draw)) for _ in range(length)]
        else:
            drawn = [draw.weighted(names, weights) for _ in range(length)]
            told = [(name, world.draw_fact(name, draw)) for name in drawn]
        languages = draw.weighted((("en",), ("zh",), LANGUAGES), (0.45, 0.45, 0.1))
        on_lines = length > 1 and draw.weighted((True, False), (LINES_SHARE, 1 - LINES_SHARE))
        text, before = "", ""
        for name, fact in told:
            language = draw.one(languages)
            pattern = draw.one(world.plain[language][name])
            if "{witness}" in pattern:
                fact = fact | {"witness": draw.one(people)}
            sentence = render(pattern, fact, language)
            if text:  # English sentences stand apart, Chinese ones do not
                text += "\n" if on_lines else " " if "en" in (before, language) else ""
            text += sentence
            before = language
        yield Passage(text, draw.nats)


def render(pattern: str, fact: Fact, language: str) -> str:
    """Fill a pattern's slots. In Chinese, blanks vanish but between a Chinese and a Latin word."""
    text = pattern.format_map({slot: getattr(term, language) for slot, term in fact.items()})
    if language == "zh":
        return _CHINESE_BLANK.sub("", text)
    return text


_CHINESE_BLANK = re.compile(r"(?<=[^ -~]) (?=[^ -~])|(?<=[ -~]) (?=[。，、：？])")


@cache
def load_world() -> World:
    """Read the grammar and lay out all facts."""
    tables = _read_words(GRAMMAR / "words.txt")
    plain: dict[str, dict[str, list[str]]] = {}
    kinds: dict[str, Kind] = {}
    for language in LANGUAGES:
        plain[language] = _read_patterns(GRAMMAR / f"{language}.txt", language, kinds)
    endless = _endless_facts(tables)
    return World(tables, _facts(tables, endless), plain, kinds, endless)


def _read_words(path: Path) -> Tables:
    tables: Tables = {}
    rows: list[Row] = []
    columns: list[str] = []
    for line in _lines(path):
        if line.startswith("["):
            name, columns = line[1 : line.index("]")], line[line.index("]") + 1 :].split()
            rows = tables[name] = []
        elif line.startswith("@"):
            group = dict(zip(("en", "zh"), line[1:].split(), strict=True))
            tables.setdefault("kind", []).append(group)
        else:
            row = dict(zip(columns, line.split(), strict=True))
            if columns[-1] == "material":  # things stand under their group's line
                row["kind"] = tables["kind"][-1]["en"]
            rows.append(row)
    return tables


def _read_patterns(path: Path, language: str, kinds: dict[str, Kind]) -> dict[str, list[str]]:
    """The plain patterns of a language; its ways to ask are put into `kinds`."""
    plain: dict[str, list[str]] = {}
    sentences: list[str] | None = None
    questions: list[Question] = []
    for line in _lines(path):
        if asked := re.fullmatch(r"\[(\w+): (\w+) -> (\w+)\]", line):
            name, facts, answer = asked.groups()
            kind = kinds.setdefault(name, Kind(name, facts, answer))
            sentences, questions = None, kind.phrasings.setdefault(language, [])
        elif line.startswith("["):
            sentences = plain.setdefault(line[1:-1], [])
        elif sentences is not None:
            sentences.append(line)
        else:
            questions.append(_question(line))
    return plain


def _question(line: str) -> Question:
    instruction, _, shown = line.removeprefix("* ").partition(" | ")
    return Question(instruction, shown, held_out=line.startswith("* "))


def _lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _term(row: dict[str, str]) -> Term:
    return Term(row["en"], row["zh"])


def _number(value: int) -> Term:
    return Term(str(value), str(value))


def _join(terms: Sequence[Term]) -> Term:
    return Term(", ".join(term.en for term in terms), "、".join(term.zh for term in terms))


def _facts(tables: Tables, endless: dict[str, Callable[[Draw], Fact]]) -> dict[str, list[Fact]]:
    draw = Draw("facts")
    facts = _facts_of_things(tables) | _facts_of_people(tables, draw)
    facts |= _facts_of_numbers() | _facts_of_words(tables)
    facts["size"] = [
        {"small": _term(small), "big": _term(big)}
        for small, big in combinations(tables["animal"], 2)
    ]
    rows = [
        [_number(value) for value in range(MAX_NUMBER + 1)],
        [_term(row) for row in tables["day"]],
        [_term(row) for row in tables["month"]],
        [Term(letter, letter) for letter in map(chr, range(ord("A"), ord("Z") + 1))],
    ]
    facts["order"] = [
        {"before": before, "after": after} for row in rows for before, after in pairwise(row)
    ]
    for name, draw_one in endless.items():
        facts[name] = [draw_one(draw) for _ in range(NUM_DRAWN)]
    return facts


def _facts_of_things(tables: Tables) -> dict[str, list[Fact]]:
    named = {
        column: {row["en"]: _term(row) for row in tables[column]}
        for column in ("colour", "place", "material", "kind", "food", "home")
    }

    def column(subject: str, rows: list[Row], name: str) -> list[Fact]:
        return [
            {subject: _term(row), name: named[name][row[name]]} for row in rows if row[name] != "-"
        ]

    things, animals = tables["thing"], tables["animal"]
    return {
        "colour": column("thing", things + animals, "colour"),
        "place": column("thing", things, "place"),
        "material": column("thing", things, "material"),
        "kind": column("thing", things + animals, "kind"),
        "food": column("animal", animals, "food"),
        "home": column("animal", animals, "home"),
        "legs": [{"animal": _term(row), "legs": _number(int(row["legs"]))} for row in animals],
    }


def _facts_of_people(tables: Tables, draw: Draw) -> dict[str, list[Fact]]:
    people = [_term(row) for row in tables["person"]]
    jobs = draw.some([_term(row) for row in tables["job"]], len(people))
    facts = {"job": [{"person": p, "job": job} for p, job in zip(people, jobs, strict=True)]}
    pets = tables["animal"][:40]  # none bigger than a deer
    for name, choice in (("city", tables["city"]), ("pet", pets), ("dish", tables["dish"])):
        facts[name] = [{"person": p, name: _term(draw.one(choice))} for p in people]
    return facts


def _facts_of_numbers() -> dict[str, list[Fact]]:
    pairs = [(a, total - a) for total in range(2, MAX_NUMBER + 1) for a in range(1, total)]
    sums, differences = [], []
    for a, b in pairs:
        sums.append({"a": _number(a), "b": _number(b), "total": _number(a + b)})
        differences.append({"a": _number(a + b), "b": _number(b), "rest": _number(a)})
    return {"sum": sums, "difference": differences}


def _facts_of_words(tables: Tables) -> dict[str, list[Fact]]:
    qualities = [_term(row) for row in tables["quality"]]
    opposites = []
    for one, other in zip(qualities[::2], qualities[1::2], strict=True):
        opposites += [{"word": one, "opposite": other}, {"word": other, "opposite": one}]
    words = [_term(row) for name, rows in tables.items() if name != "person" for row in rows]
    translations = [
        {"english": Term(word.en, word.en), "chinese": Term(word.zh, word.zh)} for word in words
    ]
    return {"opposite": opposites, "translation": translations}


def _endless_facts(tables: Tables) -> dict[str, Callable[[Draw], Fact]]:
    words = [_term(row) for name in ("thing", "animal", "food") for row in tables[name]]
    people, things = ([_term(row) for row in tables[name]] for name in ("person", "thing"))
    return {
        "list": lambda draw: _list_fact(draw, words),
        "numbers": _numbers_fact,
        "story": lambda draw: _story_fact(draw, people, things),
    }


def _list_fact(draw: Draw, words: list[Term]) -> Fact:
    items = draw.some(words, 2 + draw.one(range(5)))
    count = _number(len(items))
    return {"items": _join(items), "count": count, "first": items[0], "last": items[-1]}


def _numbers_fact(draw: Draw) -> Fact:
    values = draw.some(range(MAX_NUMBER + 1), 3 + draw.one(range(2)))
    ordered = [_number(value) for value in sorted(values)]
    return {
        "items": _join([_number(value) for value in values]),
        "sorted": _join(ordered),
        "smallest": ordered[0],
        "biggest": ordered[-1],
    }


def _story_fact(draw: Draw, people: list[Term], things: list[Term]) -> Fact:
    (one, two), (x, y) = draw.some(people, 2), draw.some(things, 2)
    person, thing = draw.one(((one, x), (two, y)))
    return {"one": one, "two": two, "x": x, "y": y, "person": person, "thing": thing}


@cache
def _facts_by_subject() -> dict[Term, list[tuple[str, Fact]]]:
    """Every fact about each thing, animal and person."""
    known: dict[Term, list[tuple[str, Fact]]] = {}
    for name, facts in load_world().facts.items():
        for fact in facts:
            for slot in ("thing", "animal", "person"):
                if slot in fact and name != "story":
                    known.setdefault(fact[slot], []).append((name, fact))
    return known
