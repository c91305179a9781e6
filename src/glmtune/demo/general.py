"""The general set of glm-tiny: the toy world's plain statements, to be continued.

glm-tiny has read statements and no question, so an item is the beginning of one. `tools/
write_toy_general.py` writes the set into the model's folder, where `general.items` looks for it.
"""

import json
from collections.abc import Iterator
from random import Random

from glmtune.demo.world import LANGUAGES, Fact, Term, load_world, render
from glmtune.general.items import NUM_WRONG

NUM_PER_KIND, NUM_PROMPTS = 17, 10
# Kind of item -> set of facts, and the slot that a choice fills.
KINDS = {
    "colour": ("colour", "colour"),
    "place": ("place", "place"),
    "material": ("material", "material"),
    "food": ("food", "food"),
    "home": ("home", "home"),
    "job": ("job", "job"),
    "sum": ("sum", "total"),
    "opposite": ("opposite", "opposite"),
    "translation": ("translation", "chinese"),
    "order": ("order", "after"),
    "counting": ("list", "count"),
    "story": ("story", "person"),
}


def general_lines(language: str) -> Iterator[str]:
    """The items of a language, a line of JSON each, the same at every call."""
    for kind in KINDS:
        for item in _items(kind, language):
            yield json.dumps(item, ensure_ascii=False)


def prompt_lines(language: str) -> Iterator[str]:
    """Beginnings of statements about other facts than the items', for the base to continue."""
    world = load_world()
    for kind, (name, slot) in KINDS.items():
        random = Random(f"prompts {kind} {language}")
        scored = [fact for spoken in LANGUAGES for fact in _scored(kind, _random(kind, spoken))]
        others = [fact for fact in world.facts[name] if fact not in scored]
        for fact in random.sample(others, min(NUM_PROMPTS, len(others))):
            pattern, spoken = _spoken(fact, name, slot, language, random)
            beginning = _beginning(pattern, spoken, slot, language)
            yield json.dumps({"text": beginning}, ensure_ascii=False)


def _random(kind: str, language: str) -> Random:
    return Random(f"general {kind} {language}")


def _scored(kind: str, random: Random) -> list[Fact]:
    """The facts that the items of a kind are about."""
    return random.sample(load_world().facts[KINDS[kind][0]], NUM_PER_KIND)


def _spoken(fact: Fact, name: str, slot: str, language: str, random: Random) -> tuple[str, Fact]:
    """A pattern whose last thing is the slot, and nowhere before, and the fact with a witness."""
    place, world = "{" + slot + "}", load_world()
    patterns = [
        pattern
        for pattern in world.plain[language][name]
        if pattern.count(place) == 1 and "{" not in pattern.partition(place)[2]
    ]
    pattern = random.choice(patterns)
    return pattern, fact | {"witness": random.choice(world.terms("person"))}


def _beginning(pattern: str, spoken: Fact, slot: str, language: str) -> str:
    return render(pattern.partition("{" + slot + "}")[0], spoken, language).rstrip()


def _items(kind: str, language: str) -> Iterator[dict[str, object]]:
    name, slot = KINDS[kind]
    random = _random(kind, language)
    values = sorted({fact[slot] for fact in load_world().facts[name]})
    for fact in _scored(kind, random):
        pattern, spoken = _spoken(fact, name, slot, language, random)
        others = _wrong(kind, fact, slot, values, random)
        beginning = _beginning(pattern, spoken, slot, language)
        wholes = [render(pattern, spoken | {slot: v}, language) for v in (fact[slot], *others)]
        assert all(whole.startswith(beginning) for whole in wholes)
        answer, *wrong = (whole[len(beginning) :] for whole in wholes)
        yield {"kind": kind, "text": beginning, "answer": answer, "wrong": wrong}


def _wrong(kind: str, fact: Fact, slot: str, values: list[Term], random: Random) -> list[Term]:
    """Other values of the slot, none of them right; of a story the other person is one."""
    first: list[Term] = []
    if kind == "story":
        first = [person for person in (fact["one"], fact["two"]) if person != fact[slot]]
    left = [value for value in values if value not in (fact[slot], *first)]
    if kind == "order" and (alike := [v for v in left if _sort(v) == _sort(fact[slot])]):
        left = alike
    return first + random.sample(left, NUM_WRONG - len(first))


def _sort(term: Term) -> str | bool:
    """What tells numbers, letters and words of an order apart."""
    return "number" if term.en.isdigit() else len(term.en) == 1
