"""Rows that come and go in a batch of separate rows, and the same rows alone."""

import random

from glmtune.generation import EncodedPrompt
from glmtune.generation.sampling import ChoiceSettings
from glmtune.generation.slots import Slots

NUM_SLOTS = 6


def questions(count, seed, ends=(), num_ids=2600, num_adapters=2):
    """Prompts of random ids with settings and adapters; `ends` are the last ids of each."""
    pick = random.Random(seed)
    return [
        (
            EncodedPrompt(
                [pick.randrange(10, num_ids) for _ in range(pick.randrange(1, 150))] + [*ends],
                number,
            ),
            ChoiceSettings(
                max_new_tokens=pick.randrange(1, 30),
                num_listed=2,
                **({} if pick.random() < 0.6 else {"do_sample": True, "frequency_penalty": 0.5}),
            ),
            pick.randrange(num_adapters + 1),
        )
        for number in range(count)
    ]


def admit(slots, places, asked):
    """Read questions into slots."""
    prompts, settings, adapters = zip(*asked, strict=True)
    slots.admit(places, prompts, settings, adapters=adapters)


def alone(decoder, question):
    """The tokens and scores of a question that nobody is beside."""
    slots, ids, scores = Slots(decoder, NUM_SLOTS), [], []
    admit(slots, [0], [question])
    while True:
        ids += slots.look()[0]
        scores += slots.scores.get(0, [])
        if not slots.num_live:
            return ids, scores
        slots.step()


def together(decoder, asked, overlaps):
    """The same of each question while others join and leave.

    Where steps overlap, tokens are read after the next step was launched.
    """
    pick, slots = random.Random(3), Slots(decoder, NUM_SLOTS)
    todo, where = list(range(len(asked))), {}
    found = [([], []) for _ in asked]

    def read(notes):
        made = slots.read(notes)
        for slot in notes.rows:
            if made[slot]:
                ids, scores = found[where[slot]]
                ids += made[slot]
                scores += slots.scores.get(slot, [])

    def width(number):
        return decoder.reads(len(asked[number][0].ids), 1)[1]

    while todo or slots.num_live:
        free = [slot for slot, row in enumerate(slots.rows) if row is None]
        pick.shuffle(free)
        if todo and free:
            group = [n for n in todo if width(n) == width(todo[0])][: pick.randrange(1, 4)]
            group = group[: min(len(free), decoder.most_prompts(width(todo[0])))]
            todo = [number for number in todo if number not in group]
            where |= dict(zip(free, group, strict=False))
            admit(slots, free[: len(group)], [asked[number] for number in group])
            read(slots.note())
        if slots.num_live and slots.step():
            notes = slots.note()
            if overlaps and slots.num_live:
                slots.step()
            read(notes)
            read(slots.note())
    return found
