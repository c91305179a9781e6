"""How a loaded model scores on a general set: the likelihood of every choice, nothing is sampled.

An item counts as right where the right answer is likelier a character than each wrong one, as
`acc_norm` of lm-evaluation-harness has it (`lm_eval/api/task.py`, process_results): summed
log-probability over the number of characters, so that a short choice is not likelier for being
short. Choices are scored without the end of an answer.

Shapes: N items, C choices of each, the right one first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from peft import PeftModel

from glmtune.data.conversations import ASSISTANT, IGNORED, USER, Example, Turn
from glmtune.data.flaws import Flaw
from glmtune.data.thoughts import arrange
from glmtune.data.token_rows import TokenRows
from glmtune.errors import UserError
from glmtune.general.items import NUM_CHOICES, GeneralSet, Item, Language
from glmtune.models.likelihood import (
    PACK_LENGTH,
    choice_sums,
    packed_layers,
    padded_sums,
    plan_choices,
)
from glmtune.models.packed import PackedModel


@dataclass(frozen=True)
class GeneralScores:
    """How one side scores on each item."""

    items: Sequence[Item]
    log_probs_NC: np.ndarray
    """Summed log-probability of each choice, in nats."""
    num_tokens_N: np.ndarray
    """Tokens of each right answer."""

    @cached_property
    def accuracy_N(self) -> np.ndarray:
        """100 where the right answer is the likeliest a character, else 0."""
        lengths_NC = np.array([[len(choice) for choice in item.choices] for item in self.items])
        right_N1, wrong_NW = np.split(self.log_probs_NC / lengths_NC, [1], axis=1)
        return np.where((right_N1 > wrong_NW).all(axis=1), 100.0, 0.0)

    @cached_property
    def log_prob_N(self) -> np.ndarray:
        """Log-probability of each right answer, in nats a token."""
        return self.log_probs_NC[:, 0] / self.num_tokens_N

    def is_in(self, part: Language | str) -> np.ndarray:
        """Which items are of a language; of all with "all"."""
        return np.array([part in ("all", item.language) for item in self.items], dtype=bool)


@dataclass(frozen=True)
class GeneralRows:
    """A general set as a base reads it: a token row for each choice."""

    general: GeneralSet
    rows: TokenRows

    @classmethod
    def of(cls, general: GeneralSet, tokenizer: Any, max_positions: int) -> "GeneralRows":
        """Encode a set: questions in the family's own layout of a first question, texts as texts.

        Args:
            general: at least one item.
            tokenizer: of the base, see `data.dataset.RowTokenizer`.
            max_positions: tokens that a row may have.

        Raises:
            UserError: an item is too long, or the family cannot write it.
        """
        encoded = [
            row
            for item in general.items
            for row in (_text_rows if item.is_text else _question_rows)(item, tokenizer)
        ]
        longest = max(len(ids) for ids, _, _ in encoded)
        if longest > max_positions:
            place = next(i for i, row in enumerate(encoded) if len(row[0]) == longest)
            asked = general.items[place // NUM_CHOICES].asked
            raise UserError(
                f"general set {general.name}: an item has {longest:,} tokens, and this base has "
                f"{max_positions:,} positions; shorten the one that begins with {asked[:20]!r}"
            )
        lengths = [len(ids) for ids, _, _ in encoded]
        rows = TokenRows(
            ids_T=np.array([i for ids, _, _ in encoded for i in ids]),
            starts_R1=np.cumsum([0, *lengths]),
            prompt_lengths_R=np.array([length for _, _, length in encoded]),
            rule=tokenizer.row_rule,
            labels_T=np.array([label for _, labels, _ in encoded for label in labels]),
        )
        return cls(general, rows)

    @property
    def num_tokens(self) -> int:
        """Tokens that a scoring computes, the prompt of an item counted once."""
        lengths_NC = self.rows.lengths_R.reshape(-1, NUM_CHOICES)
        labels_NC = self.rows.num_labels_R.reshape(-1, NUM_CHOICES)
        return int((lengths_NC - labels_NC)[:, 0].sum() + labels_NC.sum())

    def score(self, model: PeftModel, packed: PackedModel | None = None) -> GeneralScores:
        """Score a model as it is now, adapter on or off, without dropout.

        Args:
            model: an adapter on a base.
            packed: its `packed_layers` as it is now, where they are at hand.
        """
        packed = packed or packed_layers(model)
        if packed is None:
            sums_R = padded_sums(model, self.rows, np.arange(len(self.rows)))
            return self.scores(sums_R.reshape(-1, NUM_CHOICES))
        sums_NC = np.zeros((len(self.general.items), NUM_CHOICES))
        for part_N in self.parts():
            sums_NC[part_N] = self.sums(packed, part_N)
        return self.scores(sums_NC)

    def parts(self, pack_length: int = PACK_LENGTH) -> list[np.ndarray]:
        """Items of each pass."""
        return plan_choices(self.rows, NUM_CHOICES, pack_length)

    def sums(self, packed: PackedModel, items_N: np.ndarray) -> np.ndarray:
        """The log-probabilities of some items' choices, ``(N, C)``."""
        return choice_sums(packed, self.rows, NUM_CHOICES, items_N)

    def scores(self, log_probs_NC: np.ndarray) -> GeneralScores:
        """The scores of all items, given the log-probabilities of their choices."""
        num_tokens_N = self.rows.num_labels_R.reshape(-1, NUM_CHOICES)[:, 0]
        return GeneralScores(self.general.items, log_probs_NC, num_tokens_N)


_Row = tuple[list[int], list[int], int]
"""Ids of a row, its labels, and how many ids the prompt has."""


def _question_rows(item: Item, tokenizer: Any) -> list[_Row]:
    asked = Turn(USER, item.asked)
    examples = [
        Example((asked, Turn(ASSISTANT, choice, supervised=True))) for choice in item.choices
    ]
    arranged = [arrange(example, None, tokenizer.opens_thoughts)[0] for example in examples]
    rule, rows = tokenizer.row_rule, []
    before, end = [special.id for special in rule.before_answer], rule.end_ids
    for row in tokenizer.encode_examples(arranged):
        if isinstance(row, Flaw):
            raise UserError(f"general set: the question {item.asked!r}: {row}")
        ids, start = list(row.input_ids), row.prompt_length
        if end and ids[-len(end) :] == end:
            del ids[-len(end) :]
        if before and ids[start : start + len(before)] == before:
            start += len(before)
        supervised = row.labels[start : len(ids)]
        rows.append((ids, [IGNORED] * start + list(supervised), row.prompt_length))
    return rows


def _text_rows(item: Item, tokenizer: Any) -> list[_Row]:
    """Texts, of which the ids from the first that differs from the beginning's are scored."""
    wholes = [item.asked + choice for choice in item.choices]
    beginning, *encoded = tokenizer.encode_batch([item.asked, *wholes])
    num = min(_num_equal(beginning, ids) for ids in encoded)
    rule = tokenizer.row_rule
    prefix = rule.text_prefix
    return [
        ([*prefix, *ids], [IGNORED] * (len(prefix) + num) + ids[num:], rule.text_start)
        for ids in encoded
    ]


def _num_equal(a: list[int], b: list[int]) -> int:
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
