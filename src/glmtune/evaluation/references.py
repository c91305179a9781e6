"""Log-probabilities of references: how likely each side finds the right answer.

Nothing is sampled, so base and tuned differ by the adapter alone. References are laid end to end as
in training, many in one pass: see `models.likelihood`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from glmtune.models.likelihood import Probe, packed_layers, score_references
from glmtune.models.packed import PackedModel

GROUP = 256
"""Records scored at a time."""


class References:
    """The references of records, scored on both sides when they are asked for.

    They are scored in groups that begin at fixed records, so that a resumed comparison computes on
    the same packs as one that was never interrupted, and gets the same numbers.

    Args:
        model: base and adapter, in evaluation mode. Build this before a decoder: packed layers may
            lay weights together, which a decoder would hold twice.
        probes: prompts with their references, one for each record.
        sides: name -> what the model is put into while that side is scored.
    """

    def __init__(
        self,
        model: Any,
        probes: Sequence[Probe],
        sides: Mapping[str, Callable[[], AbstractContextManager[Any]]],
    ):
        self._model, self._probes, self._sides = model, probes, sides
        self._packed: dict[str, PackedModel | None] = {}
        for name, enter in sides.items():
            with enter():
                self._packed[name] = packed_layers(model)
        self._first = 0
        self._group: list[dict[str, float | int] | None] = []

    def of(self, number: int) -> dict[str, float | int] | None:
        """A record's reference: its tokens, and its log-probability on each side.

        Args:
            number: the record's place, from 0.

        Returns:
            None where it cannot be scored, see `score_references`.
        """
        place = number - self._first
        if not 0 <= place < len(self._group):
            self._first, place = number - number % GROUP, number % GROUP
            probes = self._probes[self._first : self._first + GROUP]
            group: list[dict[str, float | int]] = [{} for _ in probes]
            for name, enter in self._sides.items():
                with enter():
                    scored = score_references(self._model, probes, self._packed[name])
                for of_record, found in zip(group, scored, strict=True):
                    if found:
                        of_record |= {"num_tokens": found.num_tokens, name: found.log_prob}
            self._group = [of_record or None for of_record in group]
        return self._group[place]
