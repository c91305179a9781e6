"""Questions about the toy world as alpaca records: some to train on, others held out.

The held-out questions ask about facts, and in phrasings, that no training record has; the base
model has read those facts as plain text, in either language.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

from glmtune.demo.world import LANGUAGES, Fact, Kind, Question, Term, load_world, render

HELD_OUT_SHARE = 0.25
NUM_HELD_OUT = 400
NUM_PER_KIND = 40
"""Training records of each kind and language, except for the kinds named next."""
# An answer that has to be found in a list or a story needs more examples than a recalled fact.
_NUM_OF_HARD_KIND = dict.fromkeys(("count", "first", "last", "sort", "holder"), 140) | (
    dict.fromkeys(("biggest", "bigger", "smaller", "sum", "difference", "after", "before"), 80)
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A question with its answer."""

    kind: str
    language: str
    instruction: str
    input: str
    output: str

    def record(self) -> dict[str, str]:
        """The alpaca record."""
        return {"instruction": self.instruction, "input": self.input, "output": self.output}


def num_right(questions: Sequence[Asked], answers: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Count the answers that are right word for word, and all, by language and by kind.

    Returns:
        "en", "zh", and each kind's name -> (right, asked).
    """
    count: dict[str, tuple[int, int]] = {}
    for question, answer in zip(questions, answers, strict=True):
        for name in (question.language, question.kind):
            right, asked = count.get(name, (0, 0))
            count[name] = right + (answer.strip() == question.output), asked + 1
    return count


@cache
def training_questions(scale: float = 1.0) -> list[Asked]:
    """Questions to train on, of every kind, as many in each language, in random order.

    Args:
        scale: factor on the demonstration's number of questions.
    """
    chosen = []
    for kind in load_world().kinds.values():
        facts = split_facts(kind.facts)[0]
        count = round(scale * _NUM_OF_HARD_KIND.get(kind.name, NUM_PER_KIND))
        for language in LANGUAGES:
            chosen += _ask(kind, language, facts, held_out=False, count=count)
    Random("training").shuffle(chosen)
    return chosen


@cache
def held_out_questions(count: int = NUM_HELD_OUT) -> list[Asked]:
    """Questions never trained on, half in each language, spread over all kinds."""
    kinds = list(load_world().kinds.values())
    per_language = count // len(LANGUAGES)
    chosen = []
    for language in LANGUAGES:
        for place, kind in enumerate(kinds):
            share = per_language // len(kinds) + (place < per_language % len(kinds))
            facts = split_facts(kind.facts)[1]
            chosen += _ask(kind, language, facts, held_out=True, count=share)
    Random("held out").shuffle(chosen)
    return chosen


def split_facts(name: str) -> tuple[list[Fact], list[Fact]]:
    """Split a set of facts for training and held out.

    Facts of the same terms stay together: 3 + 4 with 4 + 3, a pair of opposites with its reverse.
    """
    facts = load_world().facts[name]
    groups = sorted({_group(fact) for fact in facts})
    Random(f"split {name}").shuffle(groups)
    held_out = set(groups[: round(len(groups) * HELD_OUT_SHARE)])
    return (
        [fact for fact in facts if _group(fact) not in held_out],
        [fact for fact in facts if _group(fact) in held_out],
    )


def _group(fact: Fact) -> tuple[Term, ...]:
    return tuple(sorted(set(fact.values())))


def _ask(
    kind: Kind, language: str, facts: Sequence[Fact], *, held_out: bool, count: int
) -> list[Asked]:
    """Different questions of one kind: facts in turn, each time in a random phrasing."""
    random = Random(f"{kind.name} {language} {held_out}")
    phrasings = [ask for ask in kind.phrasings[language] if ask.held_out == held_out]
    turn = random.sample(facts, min(count, len(facts)))
    asked: dict[tuple[str, str], Asked] = {}
    while len(asked) < count:
        fact = turn[len(asked) % len(turn)]
        question = _fill(kind, language, fact, random.choice(phrasings), random)
        asked.setdefault((question.instruction, question.input), question)
    return list(asked.values())


def _fill(kind: Kind, language: str, fact: Fact, ask: Question, random: Random) -> Asked:
    if "{other}" in ask.instruction + ask.input:
        one, other = random.sample([fact["big"], fact["small"]], 2)
        fact = fact | {"one": one, "other": other}
    return Asked(
        kind=kind.name,
        language=language,
        instruction=render(ask.instruction, fact, language),
        input=render(ask.input, fact, language),
        output=getattr(fact[kind.answer], language),
    )
