"""The rows of a running batch: prompts join and leave, and each step adds a token to every row.

Each slot holds one prompt and its answer, with a column, an end, stop ids and sampling numbers of
its own. A prompt is read when it joins (`admit`). Then each step reads the newest token of every
row and chooses the next, all on the device, in buffers of fixed size and place: on a GPU the step
is captured once and replayed, so that it costs one launch. The host counts tokens and reads the
results every few steps; nothing on the device waits for that.

Shapes: B slots, or those of them that are admitted at once; S columns of the longest prompt,
K columns of the buffers, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from glmtune.config.groups import AnswerSettings
from glmtune.errors import UserError
from glmtune.generation.prompts import EncodedPrompt
from glmtune.generation.reference import NOT_FINITE
from glmtune.generation.sampling import Sampling, choose, is_plain, largest, random_numbers
from glmtune.generation.streaming import before_stop
from glmtune.hardware import capture_graph
from glmtune.models.decoding import Angles, KeyValueCache, Place, decode, prefill
from glmtune.ops.attention import prefix_lm_mask

if TYPE_CHECKING:
    from glmtune.generation.decoder import Decoder

COLUMNS_PER_GROWTH = 128
"""Buffers have a multiple of this many columns: few sizes, so that few steps are captured."""
WARM_UP_STEPS = 3
"""Steps run before a capture, so that what libraries set up at first use is not captured."""


@dataclass
class Row:
    """What the host knows about an answer."""

    column: int
    """The column of its newest token."""
    told: int
    """The first column that the host has not read yet."""
    end: int
    """The column after the last that it may fill."""
    stop_ids: Collection[int]
    is_plain: bool


class Buffers(NamedTuple):
    """All that a step reads and writes. Column k of a slot belongs to the k-th token of its row."""

    cache: KeyValueCache
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
    numbers_BK: Tensor
    """The random number with which the token of each column is drawn."""
    row_B: Tensor
    column_K: Tensor

    def tensors(self) -> Iterator[Tensor]:
        """Each of them."""
        for field in self:
            yield from [field] if isinstance(field, Tensor) else field


class Slots:
    """A batch of a fixed number of rows, any of which may be empty.

    Args:
        decoder: supplies the weights and the functions that read the rows.
        num_slots: rows that each step computes, empty ones included.
    """

    def __init__(self, decoder: "Decoder", num_slots: int):
        self.decoder = decoder
        self.rows: list[Row | None] = [None] * num_slots
        self._buffers: Buffers | None = None
        self._replays: dict[bool, Callable[[], None]] = {}
        """Captured steps: one for rows that all take the likeliest token, one for any others."""
        self._pool: Any = None

    @property
    def num_live(self) -> int:
        """Slots whose answer is not finished."""
        return sum(row is not None for row in self.rows)

    @torch.inference_mode()
    def admit(
        self,
        first: int,
        prompts: Sequence[EncodedPrompt],
        settings: Sequence[AnswerSettings],
        stop_ids: Sequence[Collection[int]] | None = None,
    ) -> None:
        """Read prompts into empty slots, from the first on, and choose each one's first token.

        Rows that are running keep their tokens. Where the buffers must grow for a longer row, they
        are copied.

        Args:
            first: the slot of the first prompt.
            prompts: each must fit into the model's positions with its answer.
            settings: one for each prompt; stop strings are left to the caller.
            stop_ids: one tuple for each prompt; by default the decoder's.
        """
        rows = slice(first, first + len(prompts))
        assert self.rows[rows] == [None] * len(prompts), "a slot is taken, or there is none"
        decoder = self.decoder
        longest = max(len(prompt.ids) for prompt in prompts)
        # Padding repeats the last id, so that no other token counts as seen.
        given = [[*p.ids, *p.ids[-1:] * (longest - len(p.ids)), len(p.ids)] for p in prompts]
        given_BS = torch.tensor(given, device=decoder.device)
        input_ids_BS, length_B = given_BS[:, :-1], given_BS[:, -1]

        ends = [len(p.ids) + s.max_new_tokens for p, s in zip(prompts, settings, strict=True)]
        num_columns = max(*ends, 0 if self._buffers is None else len(self._buffers.column_K))
        num_columns += -num_columns % COLUMNS_PER_GROWTH
        ids_BK = F.pad(input_ids_BS, (0, num_columns - longest))
        layout = decoder.block.layout(ids_BK, decoder.config)
        angles = decoder.block.angles(layout.positions, decoder.config)
        buffers = self._with_room(num_columns, angles)
        for kept, angle in zip(buffers.angles, angles, strict=True):
            kept[rows] = angle
        buffers.tokens_BK[rows] = ids_BK
        buffers.column_B1[rows, 0] = length_B
        plain = [is_plain(each) for each in settings]
        if not all(plain):
            self._set_sampling(buffers, rows, prompts, settings, input_ids_BS)

        # Padding at the end comes after everything that a token sees.
        valid_BS = torch.ones_like(input_ids_BS, dtype=torch.bool)
        logits_BV = prefill(
            decoder.weights,
            decoder.block,
            input_ids_BS,
            length_B,
            prefix_lm_mask(layout.prefix_end_B, valid_BS),
            Angles(*(angle[rows, :longest] for angle in buffers.angles)),
            buffers.cache.part(rows, longest),
        )
        self._choose(buffers, logits_BV, all(plain), rows)
        buffers.live_B1[rows] = 1  # last, so that a slot stays empty if memory runs out
        stops = stop_ids or [decoder.stop_ids] * len(prompts)
        for slot, prompt in enumerate(prompts):
            column = len(prompt.ids)
            row = Row(column, column, ends[slot], stops[slot], plain[slot])
            self.rows[first + slot] = row

    @torch.inference_mode()
    def step(self, times: int = 1) -> None:
        """Generate some tokens for every row, but no more than any running row has left.

        A row that generates a stop id continues until `look`, which drops what follows the stop id.
        """
        buffers, rows = self._buffers, [row for row in self.rows if row is not None]
        assert buffers is not None, "no row was admitted"
        assert rows, "every slot is empty"
        plain = all(row.is_plain for row in rows)
        for _ in range(min([times, *(row.end - 1 - row.column for row in rows)])):
            if self.decoder.captures:
                if plain not in self._replays:
                    self._replays[plain] = self._capture(buffers, plain)
                self._replays[plain]()
            else:
                self._step(buffers, plain, max(row.column for row in rows) + 1)
            for row in rows:
                row.column += 1

    @torch.inference_mode()
    def look(self) -> list[list[int]]:
        """The tokens of each slot since the last look; a row that has ended leaves its slot.

        A row's tokens end with its stop id, if it has generated one.

        Raises:
            UserError: a score was not finite. All slots are empty then.
        """
        live = {slot: row for slot, row in enumerate(self.rows) if row is not None}
        made: list[list[int]] = [[] for _ in self.rows]
        if self._buffers is None or not live:
            return made
        start = min(row.told for row in live.values())
        end = max(row.column for row in live.values()) + 1
        table = self._buffers.tokens_BK[:, start:end].tolist()
        if self._buffers.fault_B.isnan().any():
            self.rows, self._buffers = [None] * len(self.rows), None  # the cache holds NaN
            raise UserError(NOT_FINITE)
        for slot, row in live.items():
            ids = table[slot][row.told - start : row.column + 1 - start]
            row.told = row.column + 1
            num_before = len(before_stop(ids, row.stop_ids))
            made[slot] = ids[: num_before + 1]
            if num_before < len(ids) or row.told == row.end:
                self.release(slot)
        return made

    @torch.inference_mode()
    def release(self, slot: int) -> None:
        """Empty a slot, whether or not its row has ended; an empty slot stays empty."""
        row, self.rows[slot] = self.rows[slot], None
        if row is None or self._buffers is None:
            return
        self._buffers.live_B1[slot] = 0
        self._buffers.column_B1[slot] = 0
        if not row.is_plain:  # or the slot's next row would be drawn as well
            self._buffers.sampling.draws_B1[slot] = False
            self._buffers.sampling.penalty_B1[slot] = 1

    def _with_room(self, num_columns: int, like: Angles) -> Buffers:
        """The buffers; if they have too few columns, larger ones with the same content."""
        old = self._buffers
        if old is not None and len(old.column_K) >= num_columns:
            return old
        self._buffers, self._replays, self._pool = None, {}, None
        if not self.num_live:
            old = None  # frees the memory first
        new = self._buffers = self._new_buffers(num_columns, like)
        if old is not None:
            for source, target in zip(old.tensors(), new.tensors(), strict=True):
                target[tuple(map(slice, source.shape))].copy_(source)
        return new

    def _new_buffers(self, num_columns: int, angles: Angles) -> Buffers:
        num_rows, device, model = len(self.rows), self.decoder.device, self.decoder.shape
        like, shape = self.decoder.weights.final_norm.weight, (num_rows, num_columns)

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return Buffers(
            cache=KeyValueCache.zeros(model, num_rows, num_columns, like),
            tokens_BK=zeros(*shape, dtype=torch.long),
            angles=Angles(*(like.new_zeros(*shape, *angle.shape[2:]) for angle in angles)),
            column_B1=zeros(num_rows, 1, dtype=torch.long),
            live_B1=zeros(num_rows, 1, dtype=torch.long),
            fault_B=zeros(num_rows, dtype=torch.float32),
            sampling=Sampling.of([AnswerSettings()] * num_rows, model.vocab_size, device),
            seen_BV=zeros(num_rows, model.vocab_size, dtype=torch.bool),
            numbers_BK=zeros(*shape, dtype=torch.float64),
            row_B=torch.arange(num_rows, device=device),
            column_K=torch.arange(num_columns, device=device),
        )

    def _set_sampling(
        self,
        buffers: Buffers,
        rows: slice,
        prompts: Sequence[EncodedPrompt],
        settings: Sequence[AnswerSettings],
        input_ids_BS: Tensor,
    ) -> None:
        device, vocab_size = self.decoder.device, self.decoder.shape.vocab_size
        new = Sampling.of(settings, vocab_size, device)
        for kept, numbers in zip(buffers.sampling, new, strict=True):
            kept[rows] = numbers
        buffers.seen_BV[rows] = False
        buffers.seen_BV[rows].scatter_(1, input_ids_BS, True)
        numbers_BK = torch.zeros(len(prompts), buffers.numbers_BK.shape[1], dtype=torch.float64)
        for row, drawn in enumerate(random_numbers(settings, prompts)):
            start = len(prompts[row].ids)
            numbers_BK[row, start : start + len(drawn)] = torch.from_numpy(drawn)
        buffers.numbers_BK[rows] = numbers_BK.to(device)

    def _capture(self, buffers: Buffers, plain: bool) -> Callable[[], None]:
        """Capture a step over all columns as a CUDA graph.

        The rows do not advance and are the same afterwards: of the cache, only the newest token's
        column is written, with what the next step writes again.
        """
        moved = buffers.live_B1, buffers.tokens_BK, buffers.seen_BV
        before = [tensor.clone() for tensor in moved]
        buffers.live_B1.zero_()
        step = partial(self._step, buffers, plain)
        with torch.cuda.device(self.decoder.device):
            graph, _ = capture_graph(step, WARM_UP_STEPS, step, pool=self._pool)
        self._pool = graph.pool()
        for tensor, kept in zip(moved, before, strict=True):
            tensor.copy_(kept)
        return graph.replay

    def _step(self, buffers: Buffers, plain: bool, num_columns: int | None = None) -> None:
        """Read the newest token of each row and choose the next; attends to the first columns only.

        Nothing here may depend on a tensor's value on the host.
        """
        column_B1 = buffers.column_B1
        run_block, run_head, needs_mask = self.decoder.functions(len(self.rows))
        mask_B11K = None
        if needs_mask:
            mask_B11K = (buffers.column_K[:num_columns] <= column_B1)[:, None, None]
        logits_BV = decode(
            self.decoder.weights,
            buffers.tokens_BK.gather(1, column_B1),
            Place(buffers.row_B, column_B1[:, 0]),
            mask_B11K,
            Angles(*(_at_column(angle, column_B1) for angle in buffers.angles)),
            buffers.cache.part(slice(None), num_columns),
            run_block,
            run_head,
        )
        self._choose(buffers, logits_BV, plain)

    @staticmethod
    def _choose(
        buffers: Buffers, logits_BV: Tensor, plain: bool, rows: slice = slice(None)
    ) -> None:
        """Choose the next token of some rows, which becomes their newest."""
        top_B, token_B = largest(logits_BV)
        buffers.fault_B[rows].add_(top_B, alpha=0)  # NaN if a score is not finite
        column_B1 = buffers.column_B1[rows].add_(buffers.live_B1[rows])
        if plain:
            buffers.tokens_BK[rows].scatter_(1, column_B1, token_B[:, None])
            return
        seen_BV, draw_B1 = buffers.seen_BV[rows], buffers.numbers_BK[rows].gather(1, column_B1)
        token_B = choose(logits_BV.float(), buffers.sampling.part(rows), seen_BV, draw_B1)
        buffers.tokens_BK[rows].scatter_(1, column_B1, token_B[:, None])
        seen_BV.scatter_(1, token_B[:, None], True)


def _at_column(angle_BKX: Tensor, column_B1: Tensor) -> Tensor:
    """The angles of one column of each row, ``(B, 1, ...)``."""
    index = column_B1.view(-1, *[1] * (angle_BKX.ndim - 1))
    return angle_BKX.gather(1, index.expand(-1, 1, *angle_BKX.shape[2:]))
