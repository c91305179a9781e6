"""Conversations as plain data: turns with their roles, which of them are supervised, and flaws.

A format of `data.formats` reads an `Example` off the fields of a row; a family's tokenizer makes an
`EncodedExample` of it (`data.dataset.RowTokenizer.encode_examples`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from glmtune.data.flaws import Flaw, show

if TYPE_CHECKING:
    from glmtune.data.dataset import RowTokenizer

SYSTEM, USER, ASSISTANT, OBSERVATION = "system", "user", "assistant", "observation"
Learn = Literal["each", "last", "marked"]
IGNORED = -100
"""The label of a token that is not supervised; transformers and torch use the same."""


class Turn(NamedTuple):
    """A message of a conversation."""

    role: str
    text: str
    """What was said; of a call, its arguments as JSON, or what the row has in their place."""
    metadata: str = ""
    """The name of the tool that an assistant's turn calls; else empty."""
    supervised: bool | None = None
    """What the row itself says about the loss; None where it says nothing."""
    thought: str | None = None
    """What was thought before an answer, in a field of its own; None without such a field."""

    @property
    def is_answer(self) -> bool:
        """Whether the model writes this turn."""
        return self.role == ASSISTANT


class PlainText(NamedTuple):
    """A text alone, to learn or to continue."""

    text: str


class Example(NamedTuple):
    """A conversation to train on, or one to be answered."""

    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """Descriptions of the tools that the model may call, as JSON objects."""

    @property
    def answers(self) -> list[int]:
        """Places of the turns that the model writes."""
        return [place for place, turn in enumerate(self.turns) if turn.is_answer]

    @property
    def calls_tools(self) -> bool:
        """Whether a tool is called, or the result of a call given."""
        return any(turn.metadata or turn.role == OBSERVATION for turn in self.turns)

    def supervise(self, learn: Learn) -> "Example":
        """The same, in which each turn says whether it is supervised.

        Args:
            learn: "each" answer, the "last" one, or those that are "marked" as such in the row. One
                that the row takes out of the loss stays out; other turns are never supervised.
        """
        unsaid = learn != "marked"
        last = self.answers[-1:] if learn == "last" else None
        turns = []
        for place, (role, text, metadata, said, thought) in enumerate(self.turns):
            is_chosen = role == ASSISTANT and (last is None or place in last)
            is_supervised = is_chosen and (unsaid if said is None else said)
            turns.append(Turn(role, text, metadata, is_supervised, thought))
        return Example(tuple(turns), self.tools)

    @property
    def asked(self) -> "Example":
        """All before the last answer; or all of it, where a question or a result stands last."""
        is_answered = bool(self.turns) and self.turns[-1].is_answer
        return self.shortened(len(self.turns) - is_answered)

    @property
    def expected(self) -> str:
        """The answer that stands last, a call with the name of its tool; empty without one."""
        last = self.turns[-1] if self.turns else None
        if last is None or not last.is_answer:
            return ""
        return f"{last.metadata}\n{last.text}" if last.metadata else last.text

    def shortened(self, num_turns: int) -> "Example":
        """The first turns of it."""
        return self._replace(turns=self.turns[:num_turns])

    def continued(self, num_turns: int) -> "Example":
        """What comes after its first turns, behind the system's words at its start."""
        num_system = next((i for i, turn in enumerate(self.turns) if turn.role != SYSTEM), 0)
        return self._replace(turns=self.turns[:num_system] + self.turns[num_turns:])

    def one_answer_each(self) -> list["Example"]:
        """For each supervised answer, the conversation up to it, with no other supervised."""
        plain = [turn._replace(supervised=False) for turn in self.turns]
        return [
            self._replace(turns=(*plain[:place], turn))
            for place, turn in enumerate(self.turns)
            if turn.supervised
        ]


Asked = str | Example | PlainText
"""What is asked: a context as rows have it, a conversation up to the answer, a text to go on."""


class EncodedExample(NamedTuple):
    """A conversation as a token row."""

    input_ids: list[int]
    labels: list[int]
    """Each token's own id where it is supervised, else `IGNORED`."""
    prompt_length: int
    """Ids before the last answer."""
    num_answers: int
    """Supervised answers."""


def check_turns(turns: Sequence[tuple[str, Turn]], needs_answer: bool = True) -> None:
    """Make sure that questions and answers take turns.

    Args:
        turns: each with the words for its place in the row.
        needs_answer: whether there has to be one.

    Raises:
        Flaw: of the first turn that cannot stand where it does, or of all if nothing is answered.
    """
    plain = [USER, ASSISTANT] * (len(turns) // 2)
    if [t.role for _, t in turns] == plain and all(t.text.strip() for _, t in turns) and plain:
        return
    previous: Turn | None = None
    for place, (where, turn) in enumerate(turns):
        following = turns[place + 1][1] if place + 1 < len(turns) else None
        _check_turn(where, turn, previous, following)
        previous = previous if turn.role == SYSTEM else turn
    if not turns:
        raise Flaw("turns", "there are no turns", "write the conversation, or remove the row")
    if not any(turn.role == USER for _, turn in turns):
        raise Flaw("no question", "no turn is a user's", "add the question, or remove the row")
    if needs_answer and not any(turn.is_answer for _, turn in turns):
        raise Flaw("no answer", "no turn is an assistant's", "add the answer, or remove the row")


def _check_turn(where: str, turn: Turn, previous: Turn | None, following: Turn | None) -> None:
    before = previous.role if previous else None
    if turn.role == USER and before == USER:
        fix = "join the two, or add the answer between them"
        raise Flaw("user twice", f"{where} is a user's, and so is the turn before it", fix)
    if turn.role in (ASSISTANT, OBSERVATION) and before is None:
        kind = "assistant first" if turn.is_answer else "observation first"
        what = f"{where} is the {turn.role}'s, and no user's stands before it"
        raise Flaw(kind, what, "begin with a question, or make this turn the system's")
    if turn.role == OBSERVATION and before == USER:
        what = f"{where} is an observation, and no call stands before it"
        raise Flaw("observation first", what, "add the assistant's call before it")
    calls = turn.metadata or (previous and previous.metadata)
    precedes_call = following is not None and following.is_answer and following.metadata
    if turn.is_answer and before == ASSISTANT and not calls and previous and previous.text:
        what = f"{where} is the assistant's, and so is the turn before it"
        raise Flaw("assistant twice", what, "join the two, or add the question between them")
    speaks = turn.role == USER or (turn.is_answer and not turn.metadata and not precedes_call)
    if speaks and not turn.text.strip():
        raise Flaw("empty turn", f"{where} ({turn.role}) is empty", "write its text, or remove it")


def rounds_of(example: Example) -> tuple[list[tuple[str, str]], str, str]:
    """Earlier rounds of question and answer, the last question, and its answer.

    For a family whose conversations are questions and answers alone: a system text at the start
    becomes the first lines of the first question. What follows the last answer is left out.

    Raises:
        Flaw: there are tools, or turns that are no question and answer.
    """
    if example.tools or example.calls_tools:
        what, fix = "tools, which this base knows none of", "leave such rows out, or name a base"
        raise Flaw("tools", what, f"{fix} that calls tools", "tools")
    turns = list(example.turns)
    system = []
    while turns and turns[0].role == SYSTEM:
        system.append(turns.pop(0).text)
    roles = [turn.role for turn in turns]
    if roles[-1:] == [USER]:
        turns, roles = turns[:-1], roles[:-1]
    if not roles or roles != [USER, ASSISTANT] * (len(roles) // 2):
        what = f"turns of the roles {show([turn.role for turn in example.turns])}"
        fix = "of this base, a question and an answer have to take turns, after the system's text"
        raise Flaw("roles", what, fix)
    asked = [turn.text for turn in turns[::2]]
    asked[0] = "".join(f"{text}\n" for text in system if text) + asked[0]
    answered = [turn.text for turn in turns[1::2]]
    return list(zip(asked[:-1], answered[:-1], strict=True)), asked[-1], answered[-1]


def encode_rounds(
    tokenizer: "RowTokenizer",
    examples: Sequence[Example],
    write: Callable[[list[tuple[str, str]], str], str],
    num_threads: int | None = None,
) -> list[EncodedExample | Flaw]:
    """Encode conversations of a family without roles: all before the last answer is the prompt.

    Args:
        tokenizer: of that family.
        examples: have passed `Example.supervise`.
        write: earlier rounds and a question to the text that the model reads.
        num_threads: as of the tokenizer's methods.

    Returns:
        For each, its row, in which the last answer alone may be supervised; or its `rounds_of`
        flaw.
    """
    rule = tokenizer.row_rule
    found: list[EncodedExample | Flaw] = []
    texts: list[str] = []
    for example in examples:
        try:
            history, question, answer = rounds_of(example)
        except Flaw as flaw:
            found.append(flaw)
            continue
        texts += [write(history, question), answer]
        found.append(EncodedExample([], [], 0, int(bool(_last(example).supervised))))
    encoded = iter(tokenizer.encode_batch(texts, num_threads=num_threads))
    for place, row in enumerate(found):
        if isinstance(row, Flaw):
            continue
        prompt, answer_ids = rule.prompt(next(encoded)), rule.answer(next(encoded))
        ids = prompt + answer_ids
        start = len(prompt) - rule.prompt_sees_all if row.num_answers else len(ids)
        labels = [IGNORED] * start + ids[start:]
        found[place] = row._replace(input_ids=ids, labels=labels, prompt_length=len(prompt))
    return found


def _last(example: Example) -> Turn:
    return example.turns[example.answers[-1]]
