"""Thoughts before answers: which of them a row has, and which it leaves out.

A thought is a field of a turn, or stands between ``<think>`` and ``</think>`` where an answer
begins. Servers whose prompts end with ``<think>`` write answers that begin behind it.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from glmtune.data.conversations import ASSISTANT, USER, Example, Turn
from glmtune.data.flaws import Flaw
from glmtune.errors import UserError

Wish = Literal["keep", "drop"]
OPEN, CLOSE = "<think>", "</think>"
_END_OF_BOTH = "think>"

KEPT, EMPTY, DROPPED, AS_TEXT, HIDDEN = "kept", "empty", "dropped", "as text", "hidden"
"""What became of a thought. HIDDEN ones stand before answers that are not supervised for it."""


def check_wish(wish: Wish | None, opens_thoughts: bool, base: str) -> None:
    """Make sure that thoughts which are to be kept can be.

    Args:
        wish: the setting `thoughts`.
        opens_thoughts: whether the base's chat template begins answers with a thought.
        base: what the base is called.

    Raises:
        UserError: they cannot.
    """
    if wish == "keep" and not opens_thoughts:
        raise UserError(
            f"thoughts keep: {base} knows no thoughts, its chat template opens none; leave it out, "
            "which leaves thoughts in a field of their own out and those inside an answer's text "
            "as text, or set thoughts drop"
        )


def check_thoughts(turns: Sequence[tuple[str, Turn]]) -> None:
    """Make sure that thoughts inside answers are whole, and that something is answered behind them.

    Args:
        turns: each with the words for its place in the row.

    Raises:
        Flaw: of the first answer that is not so, or that has another thought in a field.
    """
    if not any(_END_OF_BOTH in turn.text for _, turn in turns):
        return
    for (where, turn), following in zip(turns, [*turns[1:], None], strict=True):
        if not turn.is_answer or turn.metadata:
            continue
        parts = _parts_of(turn)
        if parts is None:
            if turn.text.lstrip().startswith(OPEN):
                what = f"{where} begins with {OPEN}, and no {CLOSE} ends that thought"
                raise Flaw("thought", what, "write the rest of it, or remove the row")
            continue
        if turn.thought and turn.thought.strip() and parts[0] not in ("", turn.thought.strip()):
            what = f"{where} has a thought in a field, and another one in its text"
            raise Flaw("thought", what, "keep one of them")
        if not parts[1] and not (following and following[1].metadata):
            what = f"{where} is a thought, and nothing is answered behind it"
            raise Flaw("empty turn", what, "write the answer, or remove the row")


def check_answer(where: str, text: str) -> None:
    """The same of an answer of a record. Raises Flaw."""
    if OPEN in text:
        check_thoughts([(where, Turn(ASSISTANT, text))])


def begins_with_thought(text: str) -> bool:
    """Whether an answer does."""
    return CLOSE in text and _parts_of(Turn(ASSISTANT, text)) is not None


def arrange(
    example: Example, wish: Wish | None, opens_thoughts: bool
) -> tuple[Example, Counter[str]]:
    """A conversation whose turns have the thoughts that the row shall have, and no others.

    A base whose chat template opens a thought sees those behind the last question only, unless all
    are to be kept or dropped. An earlier answer, whose thought it would not see, is then not
    supervised, since it is never to be given without one. For other bases a thought inside an
    answer's text is text, as in their chat templates.

    Args:
        example: has passed `Example.supervise`.
        wish: the setting `thoughts`.
        opens_thoughts: see `check_wish`.

    Returns:
        The conversation, and how many thoughts became what.
    """
    fates: Counter[str] = Counter()
    if not any(map(_thinks, example.turns)):
        return example, fates
    roles = [turn.role for turn in example.turns]
    last_question = len(roles) - 1 - roles[::-1].index(USER) if USER in roles else -1
    turns = []
    for place, turn in enumerate(example.turns):
        if not _thinks(turn):
            turns.append(turn)
            continue
        if turn.thought is None and not (opens_thoughts or wish):
            fates[AS_TEXT] += 1
            turns.append(turn)
            continue
        bare = _split(turn)
        assert bare.thought is not None
        stays = opens_thoughts and (wish == "keep" or (wish is None and place > last_question))
        if stays:
            fates[KEPT if bare.thought else EMPTY] += 1
            turns.append(bare)
            continue
        bare = bare._replace(thought=None)
        if turn.thought or bare.text != turn.text:
            is_hidden = opens_thoughts and wish is None and bool(bare.supervised)
            fates[HIDDEN if is_hidden else DROPPED] += 1
            bare = bare._replace(supervised=bool(bare.supervised) and not is_hidden)
        following = example.turns[place + 1 : place + 2]
        if bare.text or not (following and following[0].metadata):
            turns.append(bare)  # else there was a thought and nothing else, before a call
    return example._replace(turns=tuple(turns)), fates


def describe(fates: Counter[str]) -> list[str]:
    """What became of thoughts, in lines for a summary."""
    lines = []
    if fates[KEPT] or fates[EMPTY]:
        empty = f", {fates[EMPTY]:,} empty ones not supervised" if fates[EMPTY] else ""
        lines.append(f"{fates[KEPT]:,} thoughts kept{empty}")
    if fates[DROPPED]:
        lines.append(f"{fates[DROPPED]:,} answers had a thought before them, left out")
    if fates[HIDDEN]:
        lines.append(
            f"{fates[HIDDEN]:,} earlier answers had a thought, which the base does not see later: "
            "it is left out, and they are not supervised; --thoughts keep writes and teaches them"
        )
    if fates[AS_TEXT]:
        lines.append(
            f"{fates[AS_TEXT]:,} answers begin with a thought, which is text to this base and "
            "taught as such; of conversations --thoughts drop leaves it out"
        )
    return lines


def _thinks(turn: Turn) -> bool:
    return turn.thought is not None or (CLOSE in turn.text and _parts_of(turn) is not None)


def _split(turn: Turn) -> Turn:
    """The turn with its thought beside its text; an empty one is an empty string."""
    thought, text = _parts_of(turn) or ("", turn.text)
    return turn._replace(thought=(turn.thought or "").strip() or thought, text=text)


def _parts_of(turn: Turn) -> tuple[str, str] | None:
    """The thought inside an answer's text, and what follows it; None without one.

    Without `OPEN` it is one only if it has no field of its own, and an answer follows.
    """
    before, close, text = turn.text.partition(CLOSE)
    if not close or not turn.is_answer or turn.metadata:
        return None
    start, opened, inside = before.partition(OPEN)
    is_one = not start.strip() if opened else turn.thought is None and bool(text.strip())
    return ((inside if opened else before).strip(), text.lstrip()) if is_one else None
