"""Questions that tell a base from its adapter by a greedy answer, and what each side answers."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from glmtune.config.settings import CheckSettings
from glmtune.data.conversations import USER, Asked, Example, Turn
from glmtune.data.flaws import Flaw
from glmtune.data.questions import read_questions, shown_question
from glmtune.data.templates import alpaca
from glmtune.errors import UserError
from glmtune.evaluation.answers import ModelChoice
from glmtune.evaluation.chat import taught_format
from glmtune.evaluation.collapse import question_of
from glmtune.evaluation.conversation import ALPACA
from glmtune.evaluation.probes import STRANGE_QUESTIONS, spread
from glmtune.evaluation.source_run import find_rows
from glmtune.generation import (
    Answer,
    Decoder,
    EncodedPrompt,
    GenerationSettings,
    answer_in_batches,
)
from glmtune.generation.prompts import prompt_ids
from glmtune.models.likelihood import Probe, packed_layers, score_references

NUM_PROBES = 8
"""Questions that an endpoint is asked."""
_AT_A_TIME = 8


class EndpointProbe(NamedTuple):
    """A message, and what base and tuned model answer to it."""

    content: str
    ids: list[int]
    """The message as the model reads it."""
    base: Answer
    tuned: Answer


def as_message(content: str) -> Asked:
    """A user's message as the family writes one."""
    return Example((Turn(USER, content),))


class Asker:
    """A loaded model with an adapter, asked by messages as an endpoint is.

    Args:
        model: base and adapter, in evaluation mode.
        tokenizer: of the base.
        max_new_tokens: longest answer.
        device: that answers.
        write: what the endpoint makes of a message, as rows of training are written.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_new_tokens: int,
        device: Any = None,
        write: Callable[[str], Asked] = as_message,
    ):
        self.model, self.tokenizer, self.write = model, tokenizer, write
        self.how = GenerationSettings(max_new_tokens=max_new_tokens)
        self.max_positions = int(model.config.max_position_embeddings)
        self.decoders = {"tuned": Decoder.of(model, self.how, device)}
        with model.disable_adapter():
            self.decoders["base"] = Decoder.of(
                model, self.how, device, beside=self.decoders["tuned"]
            )

    def encode(self, contents: Sequence[str]) -> list[list[int] | None]:
        """Messages as the model reads them; None where the family cannot write one."""
        rows = prompt_ids(self.tokenizer, [self.write(content) for content in contents])
        return [None if isinstance(row, Flaw) else row for row in rows]

    def answers(
        self, side: str, rows: Sequence[list[int]], max_new_tokens: int | None = None
    ) -> list[Answer]:
        """Greedy answers of base or tuned model."""
        how = self.how
        if max_new_tokens is not None:
            how = GenerationSettings(max_new_tokens=max_new_tokens)
        prompts = [EncodedPrompt(row, number) for number, row in enumerate(rows)]
        decoder = self.decoders[side]
        return [*answer_in_batches(self.model, self.tokenizer, prompts, how, _AT_A_TIME, decoder)]

    def shown(self, text: str) -> str:
        """An answer as a chat shows it, which some endpoints send and others do not."""
        from glmtune.models.families import family_of

        return family_of(self.model.config).chat.polish(text).strip()


def choose_probes(asker: Asker, contents: Iterable[str]) -> list[EndpointProbe]:
    """Those of some messages to which base and adapter answer most differently.

    That is where each side finds its own answer likelier than the other's by the most, in nats
    summed over both answers.

    Raises:
        UserError: both sides answer all of them alike.
    """
    unique = list(dict.fromkeys(content.strip() for content in contents if content.strip()))
    room = asker.max_positions - asker.how.max_new_tokens
    encoded = zip(unique, asker.encode(unique), strict=True)
    asked = [(content, ids) for content, ids in encoded if ids and len(ids) <= room]
    rows = [ids for _, ids in asked]
    base, tuned = asker.answers("base", rows), asker.answers("tuned", rows)
    found = [
        EndpointProbe(content, ids, *both)
        for (content, ids), *both in zip(asked, base, tuned, strict=True)
        if asker.shown(both[0].text) != asker.shown(both[1].text)
    ]
    if not found:
        raise UserError(
            f"base and adapter answer all of {len(asked)} questions alike, so that nothing tells "
            "them apart; name rows of the adapter's task with --data_path, or raise max_new_tokens"
        )
    order = np.argsort([-gap for gap in _gaps(asker, found)], kind="stable")
    return [found[i] for i in order[:NUM_PROBES]]


def _gaps(asker: Asker, probes: Sequence[EndpointProbe]) -> list[float]:
    """The nats by which each side prefers its own answer, both sides together."""
    texts = [text for probe in probes for text in (probe.base.text, probe.tuned.text)]
    answers = asker.tokenizer.encode_batch(texts)
    rows = [
        Probe(probe.ids, answers[2 * number + own])
        for number, probe in enumerate(probes)
        for own in (0, 1)
    ]
    model = asker.model
    tuned = score_references(model, rows, packed_layers(model))
    with model.disable_adapter():
        base = score_references(model, rows, packed_layers(model))
    gained = [t.log_prob - b.log_prob if t and b else 0.0 for t, b in zip(tuned, base, strict=True)]
    return [own - other for other, own in zip(gained[::2], gained[1::2], strict=True)]


def is_taught_alpaca(subject: ModelChoice) -> bool:
    """Whether an adapter was taught in alpaca's template."""
    assert subject.adapter is not None
    return taught_format(subject.adapter)[0] == ALPACA


def candidates(settings: CheckSettings, subject: ModelChoice, bare: bool) -> list[str]:
    """Messages to choose from: of a file or the adapter's run, and unrelated questions of ours.

    An adapter that was taught in alpaca's template is asked in it.

    Args:
        settings: of the check.
        subject: the adapter.
        bare: the endpoint puts questions into that template by itself.

    Raises:
        UserError: the file cannot be read.
    """
    write = alpaca if is_taught_alpaca(subject) and not bare else str
    if settings.data_path:
        rows, _, _ = read_questions(settings.data_path, settings.format, encoding=settings.encoding)
        places = spread(len(rows), settings.limit)
        asked = [
            row.asked
            if isinstance(row.asked, str) and not bare
            else "\n".join(filter(None, shown_question(row.fields)))
            for row in (rows[i] for i in places)
        ]
    else:
        asked = [write(question) for question in _of_run(subject, settings.limit)]
    return asked + [write(question) for question, _ in STRANGE_QUESTIONS]


def _of_run(subject: ModelChoice, limit: int) -> list[str]:
    """Questions that the adapter's run held out, else those that it was trained on."""
    assert subject.adapter is not None
    run = find_rows(subject.adapter, subject.tokenizer)
    if run is None:
        return []
    row_ids = run.held_out if len(run.held_out) else run.trained_on
    found = []
    for row in row_ids[spread(len(row_ids), limit)]:
        ids = run.rows[row][: run.rows.prompt_lengths_R[row]].tolist()
        found.append(question_of(subject.tokenizer.decode(ids, skip_special_tokens=True)))
    return found
