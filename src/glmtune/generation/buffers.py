"""What the step of a running batch reads and writes, in tensors of fixed size and place.

Shapes: B slots, or some of them; K columns of the buffers, V vocabulary, T likeliest tokens that
are listed beside each one.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from glmtune.config.groups import AnswerSettings
from glmtune.generation.sampling import Sampling
from glmtune.models.decoding import Angles, KeyValueCache
from glmtune.models.shape import Shape

MOST_LISTED = 20
"""Most tokens whose probability is listed beside each token of an answer."""


class Scores(NamedTuple):
    """Logarithms of probabilities of the token in each column, where a row asks for them.

    They are the model's own, before any setting of sampling.
    """

    chosen_BK: Tensor
    listed_ids_BKT: Tensor
    """The likeliest tokens in this place, the likeliest first."""
    listed_BKT: Tensor

    def write(self, logits_BV: Tensor, token_B1: Tensor, column_B1: Tensor) -> None:
        """Write what belongs to the newest token of each row."""
        log_probs_BV = logits_BV.float().log_softmax(-1)
        listed_BT, ids_BT = log_probs_BV.topk(self.listed_BKT.shape[-1], -1)
        place_B1T = column_B1[:, :, None].expand(-1, 1, listed_BT.shape[-1])
        self.chosen_BK.scatter_(1, column_B1, log_probs_BV.gather(1, token_B1))
        self.listed_ids_BKT.scatter_(1, place_B1T, ids_BT[:, None])
        self.listed_BKT.scatter_(1, place_B1T, listed_BT[:, None])


class Buffers(NamedTuple):
    """All that a step reads and writes. Column k of a slot belongs to the k-th token of its row."""

    cache: KeyValueCache
    """Its first columns are those of a prefix that every row has, where there is one."""
    tokens_BK: Tensor
    angles: Angles
    """Cosines and sines of all columns, ``(B, K, ...)``."""
    column_B1: Tensor
    """Column of the newest token, which is not in the cache yet; 0 in an empty slot."""
    live_B1: Tensor
    """1 for a running row; 0 in an empty slot, whose column does not advance."""
    fault_B: Tensor
    """0; NaN once a score was not finite."""
    sampling: Sampling
    seen_BV: Tensor
    """Tokens that prompt and answer have, for a repetition penalty."""
    count_BV: Tensor
    """How often the answer has each token, for penalties by count."""
    numbers_BK: Tensor
    """The random number with which the token of each column is drawn."""
    adapter_B1: Tensor
    """The adapter of each row, see `mixed.MixedAdapters`; 0 for none."""
    scores: Scores
    row_B: Tensor
    column_K: Tensor
    """The columns of the cache; those of a prefix are negative."""

    @classmethod
    def zeros(
        cls,
        shape: Shape,
        num_rows: int,
        num_columns: int,
        like: Tensor,
        angles: Angles,
        prefix: KeyValueCache | None = None,
    ) -> "Buffers":
        """Make empty buffers for a model.

        Args:
            shape: of the model.
            num_rows: slots.
            num_columns: tokens of the longest row with its answer.
            like: a tensor of the type and device of the cache.
            angles: of any row, for their shapes.
            prefix: keys and values before those of every row, see `models.prefixed`.
        """
        device, vocab_size = like.device, shape.vocab_size

        def zeros(*sizes: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(num_rows, *sizes, dtype=dtype, device=device)

        listed = num_columns, min(MOST_LISTED, vocab_size)
        num_before = 0 if prefix is None else prefix.keys.shape[3]
        cache = KeyValueCache.zeros(shape, num_rows, num_before + num_columns, like)
        for columns, of_prefix in zip(cache, prefix or (), strict=prefix is not None):
            columns[:, :, :, :num_before] = of_prefix
        return cls(
            cache=cache,
            tokens_BK=zeros(num_columns, dtype=torch.long),
            angles=Angles(
                *(like.new_zeros(num_rows, num_columns, *angle.shape[2:]) for angle in angles)
            ),
            column_B1=zeros(1, dtype=torch.long),
            live_B1=zeros(1, dtype=torch.long),
            fault_B=zeros(dtype=torch.float32),
            sampling=Sampling.of([AnswerSettings()] * num_rows, vocab_size, device),
            seen_BV=zeros(vocab_size, dtype=torch.bool),
            count_BV=zeros(vocab_size, dtype=torch.float32),
            numbers_BK=zeros(num_columns, dtype=torch.float64),
            adapter_B1=zeros(1, dtype=torch.long),
            scores=Scores(
                zeros(num_columns, dtype=torch.float32),
                zeros(*listed, dtype=torch.long),
                zeros(*listed, dtype=torch.float32),
            ),
            row_B=torch.arange(num_rows, device=device),
            column_K=torch.arange(-num_before, num_columns, device=device),
        )

    @property
    def num_columns(self) -> int:
        """Columns of tokens."""
        return self.tokens_BK.shape[1]

    @property
    def num_before(self) -> int:
        """Columns of the prefix."""
        return len(self.column_K) - self.num_columns

    def tensors(self) -> Iterator[Tensor]:
        """Each of them."""
        for field in self:
            yield from [field] if isinstance(field, Tensor) else field

    def take_over(self, old: "Buffers") -> None:
        """Copy the content of buffers with fewer columns."""
        for source, target in zip(old.tensors(), self.tensors(), strict=True):
            target[tuple(map(slice, source.shape))].copy_(source)

    def rows(self, rows: slice, num_columns: int | None = None) -> "Buffers":
        """Some rows, the cache of them up to a column: views."""
        if num_columns is not None:
            num_columns += self.num_before
        return self._replace(
            cache=self.cache.part(rows, num_columns),
            tokens_BK=self.tokens_BK[rows],
            angles=Angles(*(angle[rows] for angle in self.angles)),
            column_B1=self.column_B1[rows],
            live_B1=self.live_B1[rows],
            fault_B=self.fault_B[rows],
            sampling=Sampling(*(tensor[rows] for tensor in self.sampling)),
            seen_BV=self.seen_BV[rows],
            count_BV=self.count_BV[rows],
            numbers_BK=self.numbers_BK[rows],
            adapter_B1=self.adapter_B1[rows],
            scores=Scores(*(tensor[rows] for tensor in self.scores)),
            row_B=self.row_B[: len(self.column_B1[rows])],
        )

    def beginning(
        self, tokens_BK: Tensor, angles: Angles, length_B1: Tensor, adapter_B1: Tensor
    ) -> "Buffers":
        """Rows whose prompts have been read, not live yet, for `put`; their cache is not among it.

        Nor are what drawing and scores need: `with_choices` and `with_scores` add them.
        """
        return self._replace(
            tokens_BK=tokens_BK,
            angles=angles,
            column_B1=length_B1.clone(),
            live_B1=torch.zeros_like(length_B1),
            fault_B=self.fault_B.new_zeros(len(length_B1)),
            adapter_B1=adapter_B1,
        )

    def with_choices(self, sampling: Sampling, seen_BV: Tensor, numbers_BK: Tensor) -> "Buffers":
        """Rows that begin, with what it takes to draw their tokens."""
        count_BV = torch.zeros_like(seen_BV, dtype=self.count_BV.dtype)
        return self._replace(
            sampling=sampling, seen_BV=seen_BV, count_BV=count_BV, numbers_BK=numbers_BK
        )

    def with_scores(self) -> "Buffers":
        """Rows that begin, with room for their tokens' scores."""
        sizes = [(len(self.tokens_BK), *tensor.shape[1:]) for tensor in self.scores]
        pairs = zip(self.scores, sizes, strict=True)
        return self._replace(scores=Scores(*(tensor.new_zeros(size) for tensor, size in pairs)))

    def put(self, rows: slice | Tensor, part: "Buffers") -> None:
        """Make rows that begin those of some slots; their cache is written already."""
        part.live_B1.fill_(1)
        # What makes a slot live comes last, so that it stays empty if memory runs out.
        names = {*self._fields} - {"cache", "row_B", "column_K"}
        for name in sorted(names, key="live_B1".__eq__):
            old, new = getattr(self, name), getattr(part, name)
            pairs = [(old, new)] if isinstance(old, Tensor) else zip(old, new, strict=True)
            for kept, value in pairs:
                if value is not kept:
                    kept[rows] = value
