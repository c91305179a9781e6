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
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from glmtune.config.groups import AnswerSettings
from glmtune.errors import UserError
from glmtune.generation.buffers import Buffers
from glmtune.generation.prompts import EncodedPrompt
from glmtune.generation.reading import CapturedPass, Placed, PromptPass, read_prompts
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
from glmtune.models.decoding import Angles, Place, decode
from glmtune.models.packed import move

if TYPE_CHECKING:
    from glmtune.generation.decoder import Decoder

T = TypeVar("T")

COLUMNS_PER_GROWTH = 128
"""Buffers have a multiple of this many columns: few sizes, so that few steps are captured."""
WARM_UP_STEPS = 3
"""Steps run before a capture, so that what libraries set up at first use is not captured."""
MOST_COLUMNS_CAPTURED = 1024
"""Wider passes of prompts keep a GPU busy for longer than the host needs to launch them; at most 16
sizes are captured, see `Decoder.reads`."""


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
        self._passes: dict[torch.Size, CapturedPass | None] = {}
        """Captured passes that read prompts; None for a size that found no memory."""
        self._pool: Any = None
        """Memory of all captured work, which never runs at the same time."""

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
        slots = range(slots, slots + len(prompts)) if isinstance(slots, int) else slots
        assert [self.rows[slot] for slot in slots] == [None] * len(prompts), (
            "a slot is taken, or there is none"
        )
        decoder, count = self.decoder, len(prompts)
        num_rows, width = decoder.reads(max(len(prompt.ids) for prompt in prompts), count)
        ends = [len(p.ids) + s.max_new_tokens for p, s in zip(prompts, settings, strict=True)]
        num_columns = max(width, *ends, 0 if self._buffers is None else self.num_columns)
        num_before = 0 if decoder.prefix is None else decoder.prefix.keys.shape[3]
        num_columns += -(num_columns + num_before) % COLUMNS_PER_GROWTH
        given = [
            Placed(prompt.ids, slot, adapter)
            for prompt, slot, adapter in zip(prompts, slots, adapters or [0] * count, strict=True)
        ]
        read, angles = PromptPass.of(decoder, given, num_rows, width, num_columns)
        buffers = self._with_room(num_columns, angles)
        part = buffers.beginning(
            F.pad(read.ids_BS[:count], (0, num_columns - width)),
            Angles(*(angle[:count] for angle in angles)),
            read.length_B[:count, None],
            read.adapter_B1[:count],
        )
        plain = [is_plain(each) for each in settings]
        listed = [num_listed(each) for each in settings]
        scored = any(number is not None for number in listed)
        if not all(plain):
            part = self._with_choices(part, prompts, settings, read.ids_BS[:count])
        if scored:
            part = part.with_scores()
        index: slice | Tensor = read.slot_B[:count]
        if decoder.separate:
            logits_BV = self._read_prompts(buffers, read)
        else:
            index = slice(slots[0], slots[-1] + 1)
            assert list(slots) == list(range(len(self.rows))[index]), "slots are not neighbours"
            cache = buffers.cache.part(index, num_before + width)
            logits_BV = read_prompts(decoder, read, cache, None)
        self._choose(part, logits_BV[:count], all(plain), scored)
        buffers.put(index, part)
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
            self._end_faulty(notes, fault_B.isnan().nonzero()[:, 0].tolist())
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

    def _end_faulty(self, notes: "Notes", slots: Sequence[int]) -> None:
        """End rows whose scores were not finite, and clean what other rows read as masked.

        A slot whose row has left since is cleaned too: its next row writes its first columns alone.
        """
        assert self._buffers is not None
        for slot in slots:
            row, noted = self.rows[slot], notes.rows.get(slot)
            if row is not None and (noted is None or noted[0] is not row):
                continue
            for tensor in self._buffers.cache:
                tensor[:, slot, :, self._buffers.num_before :] = 0
            self._buffers.fault_B[slot] = 0
            if row is not None:
                self.faulty.add(slot)
                self.release(slot)

    def _with_room(self, num_columns: int, like: Angles) -> Buffers:
        """The buffers; if they have too few columns, larger ones with the same content."""
        old = self._buffers
        if old is not None and self.num_columns >= num_columns:
            return old
        self._replays, self._passes, self._pool = {}, {}, None
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

    def _with_choices(
        self,
        part: Buffers,
        prompts: Sequence[EncodedPrompt],
        settings: Sequence[AnswerSettings],
        input_ids_BS: Tensor,
    ) -> Buffers:
        device, vocab_size = self.decoder.device, self.decoder.shape.vocab_size
        seen_BV = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
        seen_BV.scatter_(1, input_ids_BS, True)
        numbers_BK = torch.zeros(part.tokens_BK.shape, dtype=torch.float64)
        for row, drawn in enumerate(random_numbers(settings, prompts)):
            start = len(prompts[row].ids)
            numbers_BK[row, start : start + len(drawn)] = torch.from_numpy(drawn)
        sampling = Sampling.of(settings, vocab_size, device)
        return part.with_choices(sampling, seen_BV, move(numbers_BK, device))

    def _capture(self, buffers: Buffers, plain: bool, scored: bool) -> Callable[[], None]:
        """Capture a step over all columns as a CUDA graph.

        The rows do not advance and are the same afterwards: of the cache, only the newest token's
        column is written, with what the next step writes again.
        """
        moved = buffers.live_B1, buffers.tokens_BK, buffers.seen_BV, buffers.count_BV
        before = [tensor.clone() for tensor in moved]
        buffers.live_B1.zero_()
        replay, _ = self._graph(partial(self._step, buffers, plain, scored), WARM_UP_STEPS)
        for tensor, kept in zip(moved, before, strict=True):
            tensor.copy_(kept)
        return replay

    def _graph(self, work: Callable[[], T], warm_up: int) -> tuple[Callable[[], None], T]:
        """Capture work on the decoder's GPU: what does it again, and where it leaves its result."""
        with torch.cuda.device(self.decoder.device):
            graph, made = capture_graph(work, warm_up, work, pool=self._pool)
        self._pool = graph.pool()
        return graph.replay, made

    def _read_prompts(self, buffers: Buffers, given: PromptPass) -> Tensor:
        """Read prompts into their slots; a pass that the host launches slowly is captured first.

        Returns:
            Logits ``(B, V)``, which the next pass may overwrite.
        """
        size = given.table_BX.shape
        captures = self.decoder.captures and given.ids_BS.shape[1] <= MOST_COLUMNS_CAPTURED
        if captures and size not in self._passes:
            try:
                self._passes[size] = CapturedPass.of(
                    self._graph, self.decoder, given, buffers.cache
                )
            except torch.OutOfMemoryError:
                self._passes[size] = None
        if captures and (captured := self._passes[size]) is not None:
            return captured.read(given)
        return read_prompts(self.decoder, given, buffers.cache, given.slot_B)

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


def _at_column(angle_BKX: Tensor, column_B1: Tensor) -> Tensor:
    """The angles of one column of each row, ``(B, 1, ...)``."""
    index = column_B1.view(-1, *[1] * (angle_BKX.ndim - 1))
    return angle_BKX.gather(1, index.expand(-1, 1, *angle_BKX.shape[2:]))
