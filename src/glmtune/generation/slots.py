"""The rows of a running batch: prompts join and leave, and each step adds a token to every row.

Each slot holds one prompt and its answer, with a column, an end, stop ids and sampling numbers of
its own. A prompt is read when it joins (`admit`). Then each step reads the newest token of every
row and chooses the next, all on the device, in buffers of fixed size and place: on a GPU the step
is captured once and replayed, so that it costs one launch. The host counts tokens and reads the
results every few steps; nothing on the device waits for that.

Shapes: B slots, or those of them that are admitted at once; S columns of the longest prompt,
K columns of the buffers, V vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from glmtune.config.groups import AnswerSettings
from glmtune.errors import UserError
from glmtune.generation.buffers import Buffers
from glmtune.generation.prompts import EncodedPrompt
from glmtune.generation.reference import NOT_FINITE
from glmtune.generation.sampling import (
    Sampling,
    choose,
    is_plain,
    largest,
    num_listed,
    random_numbers,
)
from glmtune.generation.streaming import before_stop
from glmtune.hardware import capture_graph
from glmtune.models.decoding import Angles, Place, decode, prefill
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
    num_listed: int | None
    """Likeliest tokens to list beside each of its own; None where no probability is asked for."""


class TokenScore(NamedTuple):
    """The logarithm of a token's probability, and those of the likeliest tokens in its place."""

    chosen: float
    listed: list[tuple[int, float]]


class Notes(NamedTuple):
    """Tokens that are being copied to the host."""

    tensors: list[Tensor]
    rows: dict[int, tuple[Row, int, int, bool]]
    """Slot -> its row, where its tokens begin and end, and whether no more may follow."""
    event: Any = None
    """Recorded after the copies on a GPU."""


class Slots:
    """A batch of a fixed number of rows, any of which may be empty.

    Args:
        decoder: supplies the weights and the functions that read the rows. If its rows are
            `separate`, prompts are read in passes of its fixed shapes, a row whose scores are not
            finite ends alone, and on a CPU the empty slots behind the last row are not computed.
        num_slots: rows that each step computes, empty ones included.
    """

    def __init__(self, decoder: "Decoder", num_slots: int):
        self.decoder = decoder
        self.rows: list[Row | None] = [None] * num_slots
        self.scores: dict[int, list[TokenScore]] = {}
        """Slot -> the scores of the tokens of the last look, of rows that ask for them."""
        self.faulty: set[int] = set()
        """Slots whose rows have ended since the last look because a score was not finite."""
        self._buffers: Buffers | None = None
        self._replays: dict[tuple[bool, bool], Callable[[], None]] = {}
        """Captured steps: whether all rows take the likeliest token, and whether any has scores."""
        self._pool: Any = None

    @property
    def num_live(self) -> int:
        """Slots whose answer is not finished."""
        return sum(row is not None for row in self.rows)

    @torch.inference_mode()
    def admit(
        self,
        slots: int | Sequence[int],
        prompts: Sequence[EncodedPrompt],
        settings: Sequence[AnswerSettings],
        stop_ids: Sequence[Collection[int]] | None = None,
        adapters: Sequence[int] | None = None,
    ) -> None:
        """Read prompts into empty slots, and choose each one's first token.

        Rows that are running keep their tokens. Where the buffers must grow for a longer row, they
        are copied.

        Args:
            slots: the slot of each prompt, or of the first one, which the others' follow.
            prompts: each must fit into the model's positions with its answer. Of separate rows, as
                many as `Decoder.reads` allows.
            settings: one for each prompt; stop strings are left to the caller.
            stop_ids: one tuple for each prompt; by default the decoder's.
            adapters: the number of each prompt's adapter among the decoder's, 0 for the base; by
                default the base, or whatever the decoder's only weights have.

        Raises:
            torch.OutOfMemoryError: the slots stay empty, and other rows are as they were.
        """
        if isinstance(slots, int):
            slots = range(slots, slots + len(prompts))
        assert [self.rows[slot] for slot in slots] == [None] * len(prompts), (
            "a slot is taken, or there is none"
        )
        decoder = self.decoder
        num_rows, width = decoder.reads(max(len(prompt.ids) for prompt in prompts), len(prompts))
        # Rows that fill the pass repeat the last prompt, and are dropped.
        filled = [*prompts, *[prompts[-1]] * (num_rows - len(prompts))]
        # Padding repeats the last id, so that no other token counts as seen.
        given = [[*p.ids, *p.ids[-1:] * (width - len(p.ids)), len(p.ids)] for p in filled]
        given_BS = torch.tensor(given, device=decoder.device)
        input_ids_BS, length_B = given_BS[:, :-1], given_BS[:, -1]

        ends = [len(p.ids) + s.max_new_tokens for p, s in zip(prompts, settings, strict=True)]
        num_columns = max(width, *ends, 0 if self._buffers is None else self.num_columns)
        prefix = decoder.prefix
        num_before = 0 if prefix is None else prefix.keys.shape[3]
        num_columns += -(num_columns + num_before) % COLUMNS_PER_GROWTH
        ids_BK = F.pad(input_ids_BS, (0, num_columns - width))
        layout = decoder.block.layout(ids_BK, decoder.config)
        angles = decoder.block.angles(layout.positions, decoder.config)
        buffers = self._with_room(num_columns, angles)
        are_views = not decoder.separate and list(slots) == list(range(slots[0], slots[-1] + 1))
        index = slice(slots[0], slots[-1] + 1) if are_views else _index(slots, decoder.device)
        part = buffers.rows(index, width)
        count = len(prompts)
        for kept, angle in zip(part.angles, angles, strict=True):
            kept.copy_(angle[:count])
        part.tokens_BK.copy_(ids_BK[:count])
        part.column_B1[:, 0] = length_B[:count]
        part.fault_B.zero_()
        chosen = [0] * count if adapters is None else list(adapters)
        part.adapter_B1[:, 0] = torch.tensor(chosen, device=decoder.device)
        plain = [is_plain(each) for each in settings]
        if not all(plain):
            self._set_sampling(part, prompts, settings, input_ids_BS[:count])
        if decoder.adapters is not None:
            filling = part.adapter_B1[-1:].expand(num_rows - count, 1)
            decoder.adapters.turn(torch.cat((part.adapter_B1, filling)))

        # Padding at the end comes after everything that a token sees.
        valid_BS = torch.ones_like(input_ids_BS, dtype=torch.bool)
        mask_B1SS = prefix_lm_mask(layout.prefix_end_B, valid_BS)
        if num_before:
            mask_B1SS = F.pad(mask_B1SS, (num_before, 0), value=True)
        cache = part.cache if num_rows == count else part.cache.more_rows(num_rows)
        logits_BV = prefill(
            decoder.weights,
            decoder.block,
            input_ids_BS,
            length_B,
            mask_B1SS,
            Angles(*(angle[:, :width].to(part.angles.cos.dtype) for angle in angles)),
            cache,
        )
        listed = [num_listed(each) for each in settings]
        self._choose(part, logits_BV[:count], all(plain), any(n is not None for n in listed))
        part.live_B1[:] = 1  # last, so that a slot stays empty if memory runs out
        if isinstance(index, Tensor):
            buffers.put(index, part._replace(cache=cache.part(slice(0, count), num_before + width)))
        stops = stop_ids or [decoder.stop_ids] * count
        for place, (slot, prompt) in enumerate(zip(slots, prompts, strict=True)):
            column = len(prompt.ids)
            row = Row(column, column, ends[place], stops[place], plain[place], listed[place])
            self.rows[slot] = row

    @torch.inference_mode()
    def step(self, times: int = 1) -> int:
        """Generate some tokens for every row, but no more than any running row has left.

        A row that generates a stop id continues until `look`, which drops what follows the stop id.

        Returns:
            How many.
        """
        buffers, rows = self._buffers, [row for row in self.rows if row is not None]
        assert buffers is not None, "no row was admitted"
        assert rows, "every slot is empty"
        plain = all(row.is_plain for row in rows)
        scored = any(row.num_listed is not None for row in rows)
        times = min([times, *(row.end - 1 - row.column for row in rows)])
        for _ in range(times):
            if self.decoder.captures:
                kind = plain, scored
                if kind not in self._replays:
                    self._replays[kind] = self._capture(buffers, plain, scored)
                self._replays[kind]()
            else:
                longest = max(row.column for row in rows) + 1
                longest += -longest % COLUMNS_PER_GROWTH
                self._step(buffers, plain, scored, longest, self._num_computed)
            for row in rows:
                row.column += 1
        return times

    def look(self) -> list[list[int]]:
        """The tokens of each slot since the last look; a row that has ended leaves its slot.

        A row's tokens end with its stop id, if it has generated one.

        Raises:
            UserError: a score was not finite, and rows are not separate. All slots are empty then.
        """
        return self.read(self.note())

    @torch.inference_mode()
    def note(self) -> "Notes":
        """Begin to copy the tokens since the last look to the host; `read` them later.

        Another step may be launched meanwhile, so that a GPU need not wait for the host.
        """
        live = {slot: row for slot, row in enumerate(self.rows) if row is not None}
        if self._buffers is None or not live:
            return Notes([], {})
        start = min(row.told for row in live.values())
        end = max(row.column for row in live.values()) + 1
        buffers, scored = self._buffers, any(row.num_listed is not None for row in live.values())
        wanted = [buffers.tokens_BK[:, start:end], buffers.fault_B]
        wanted += [tensor[:, start:end] for tensor in buffers.scores] if scored else []
        notes = Notes(
            [tensor.to("cpu", non_blocking=True) for tensor in wanted],
            {
                slot: (row, row.told - start, row.column + 1 - start, row.column + 1 == row.end)
                for slot, row in live.items()
            },
            torch.cuda.Event() if buffers.fault_B.is_cuda else None,
        )
        if notes.event is not None:
            notes.event.record()
        for row in live.values():
            row.told = row.column + 1
        return notes

    @torch.inference_mode()
    def read(self, notes: "Notes") -> list[list[int]]:
        """The tokens of each slot that were noted; see `look`.

        A row that has left its slot since is passed over.
        """
        made: list[list[int]] = [[] for _ in self.rows]
        self.scores, self.faulty = {}, set()
        if not notes.rows:
            return made
        if notes.event is not None:
            notes.event.synchronize()
        tokens_BK, fault_B, *scores = notes.tensors
        if fault_B.isnan().any():
            if not self.decoder.separate:
                self.rows, self._buffers = [None] * len(self.rows), None  # the cache holds NaN
                raise UserError(NOT_FINITE)
            found = fault_B.isnan().nonzero()[:, 0].tolist()
            same = [s for s in found if s in notes.rows and self.rows[s] is notes.rows[s][0]]
            self._end_faulty(same)
        table = tokens_BK.tolist()
        for slot, (row, start, end, is_whole) in notes.rows.items():
            if self.rows[slot] is not row:
                continue
            ids = table[slot][start:end]
            num_before = len(before_stop(ids, row.stop_ids))
            made[slot] = ids[: num_before + 1]
            if row.num_listed is not None:
                of_row = [tensor[slot, start : start + len(made[slot])] for tensor in scores]
                self.scores[slot] = _listed(of_row, row.num_listed)
            if num_before < len(ids) or is_whole:
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
            self._buffers.sampling.reset(slot)

    @property
    def num_columns(self) -> int:
        """Columns of the buffers: tokens of the longest row so far with its answer, or more."""
        return 0 if self._buffers is None else self._buffers.num_columns

    @property
    def _num_computed(self) -> int:
        """Slots that a step computes which is not captured."""
        if not self.decoder.separate:
            return len(self.rows)
        return 1 + max(slot for slot, row in enumerate(self.rows) if row is not None)

    def _end_faulty(self, slots: Sequence[int]) -> None:
        """End rows whose scores were not finite, and clean what other rows read as masked."""
        assert self._buffers is not None
        for slot in slots:
            for tensor in self._buffers.cache:
                tensor[:, slot, :, self._buffers.num_before :] = 0
            self._buffers.fault_B[slot] = 0
            self.faulty.add(slot)
            self.release(slot)

    def _with_room(self, num_columns: int, like: Angles) -> Buffers:
        """The buffers; if they have too few columns, larger ones with the same content."""
        old = self._buffers
        if old is not None and self.num_columns >= num_columns:
            return old
        self._replays, self._pool = {}, None
        if not self.num_live:
            old = self._buffers = None  # frees the memory first
        new = Buffers.zeros(
            self.decoder.shape,
            len(self.rows),
            num_columns,
            self.decoder.weights.final_norm.weight,
            like,
            self.decoder.prefix,
        )
        if old is not None:
            new.take_over(old)
        self._buffers = new
        return new

    def _set_sampling(
        self,
        part: Buffers,
        prompts: Sequence[EncodedPrompt],
        settings: Sequence[AnswerSettings],
        input_ids_BS: Tensor,
    ) -> None:
        device, vocab_size = self.decoder.device, self.decoder.shape.vocab_size
        new = Sampling.of(settings, vocab_size, device)
        for kept, numbers in zip(part.sampling, new, strict=True):
            kept.copy_(numbers)
        part.seen_BV.zero_().scatter_(1, input_ids_BS, True)
        part.count_BV.zero_()
        numbers_BK = torch.zeros(part.numbers_BK.shape, dtype=torch.float64)
        for row, drawn in enumerate(random_numbers(settings, prompts)):
            start = len(prompts[row].ids)
            numbers_BK[row, start : start + len(drawn)] = torch.from_numpy(drawn)
        part.numbers_BK.copy_(numbers_BK)

    def _capture(self, buffers: Buffers, plain: bool, scored: bool) -> Callable[[], None]:
        """Capture a step over all columns as a CUDA graph.

        The rows do not advance and are the same afterwards: of the cache, only the newest token's
        column is written, with what the next step writes again.
        """
        moved = buffers.live_B1, buffers.tokens_BK, buffers.seen_BV, buffers.count_BV
        before = [tensor.clone() for tensor in moved]
        buffers.live_B1.zero_()
        step = partial(self._step, buffers, plain, scored)
        with torch.cuda.device(self.decoder.device):
            graph, _ = capture_graph(step, WARM_UP_STEPS, step, pool=self._pool)
        self._pool = graph.pool()
        for tensor, kept in zip(moved, before, strict=True):
            tensor.copy_(kept)
        return graph.replay

    def _step(
        self,
        buffers: Buffers,
        plain: bool,
        scored: bool,
        num_columns: int | None = None,
        num_rows: int | None = None,
    ) -> None:
        """Read the newest token of each row and choose the next; attends to the first columns only.

        Nothing here may depend on a tensor's value on the host.
        """
        part = buffers.rows(slice(0, num_rows), num_columns)
        column_B1 = part.column_B1
        run_block, run_head, needs_mask = self.decoder.functions(len(column_B1))
        mask_B11K, num_before = None, buffers.num_before
        if needs_mask:
            end = None if num_columns is None else num_before + num_columns
            mask_B11K = (buffers.column_K[:end] <= column_B1)[:, None, None]
        column_B = column_B1[:, 0]
        if self.decoder.adapters is not None:
            self.decoder.adapters.turn(part.adapter_B1)
        logits_BV = decode(
            self.decoder.weights,
            part.tokens_BK.gather(1, column_B1),
            Place(part.row_B, column_B + num_before if num_before else column_B),
            mask_B11K,
            Angles(*(_at_column(angle, column_B1) for angle in part.angles)),
            part.cache,
            run_block,
            run_head,
        )
        self._choose(part, logits_BV, plain, scored)

    @staticmethod
    def _choose(part: Buffers, logits_BV: Tensor, plain: bool, scored: bool) -> None:
        """Choose the next token of some rows, which becomes their newest."""
        top_B, token_B = largest(logits_BV)
        part.fault_B.add_(top_B, alpha=0)  # NaN if a score is not finite
        column_B1 = part.column_B1.add_(part.live_B1)
        if not plain:
            draw_B1 = part.numbers_BK.gather(1, column_B1)
            token_B = choose(logits_BV.float(), part.sampling, part.seen_BV, part.count_BV, draw_B1)
            part.seen_BV.scatter_(1, token_B[:, None], True)
            ones_B1 = torch.ones_like(token_B[:, None], dtype=part.count_BV.dtype)
            part.count_BV.scatter_add_(1, token_B[:, None], ones_B1)
        part.tokens_BK.scatter_(1, column_B1, token_B[:, None])
        if scored:
            part.scores.write(logits_BV, token_B[:, None], column_B1)


def _listed(of_row: Sequence[Tensor], num_listed: int) -> list[TokenScore]:
    """Scores of some tokens of a row: `Scores` without the other rows."""
    chosen, ids, listed = (tensor.tolist() for tensor in of_row)
    return [
        TokenScore(score, list(zip(ids_T[:num_listed], listed_T[:num_listed], strict=True)))
        for score, ids_T, listed_T in zip(chosen, ids, listed, strict=True)
    ]


def _index(slots: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(slots), device=device)


def _at_column(angle_BKX: Tensor, column_B1: Tensor) -> Tensor:
    """The angles of one column of each row, ``(B, 1, ...)``."""
    index = column_B1.view(-1, *[1] * (angle_BKX.ndim - 1))
    return angle_BKX.gather(1, index.expand(-1, 1, *angle_BKX.shape[2:]))
