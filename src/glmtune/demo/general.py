"""The general set of glm-tiny: the toy world's plain statements, to be continued.

glm-tiny has read statements and no question, so an item is the beginning of one. `tools/
write_toy_general.py` writes the set into the model's folder, where `general.items` looks for it.
"""

import json
from collections.abc import Iterator
from random import Random

from glmtune.demo.world import Fact, Term, load_world, render
from glmtune.general.items import NUM_WRONG

NUM_PER_KIND = 17
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


def _items(kind: str, language: str) -> Iterator[dict[str, object]]:
    name, slot = KINDS[kind]
    world, random = load_world(), Random(f"general {kind} {language}")
    # The slot is what continues the statement: the last thing in it, and nowhere before.
    place = "{" + slot + "}"
    patterns = [
        pattern
        for pattern in world.plain[language][name]
        if pattern.count(place) == 1 and "{" not in pattern.partition(place)[2]
    ]
    values = sorted({fact[slot] for fact in world.facts[name]})
    people = world.terms("person")
    for fact in random.sample(world.facts[name], NUM_PER_KIND):
        pattern = random.choice(patterns)
        spoken = fact | {"witness": random.choice(people)}
        others = _wrong(kind, fact, slot, values, random)
        beginning = render(pattern.partition(place)[0], spoken, language).rstrip()
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
