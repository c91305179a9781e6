"""Requests that join and leave the batch between steps, in a thread of its own.

The thread owns the slots. It takes prompts from a queue in which clients have equal shares, reads
as many at a time as one pass holds, and after each step hands out each row's new tokens.
"""

import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from glmtune.generation import Decoder, EncodedPrompt
from glmtune.generation.sampling import ChoiceSettings
from glmtune.generation.slots import Notes, Row, Slots, TokenScore
from glmtune.serving.errors import RequestError, failed, overloaded, unavailable

MOST_PASSES_BETWEEN_STEPS = 4
"""Prompts are read that many passes long before running answers get their next token."""
MOST_PASSES_AT_FIRST = 8
"""That many where no answer was running before: all that wait then have their first token."""
_SECONDS_OF_A_LAUNCH = 0.005
"""Who submits works waits that long at most: a pass of a new size is captured first."""
STOP, LENGTH = "stop", "length"


class Update(NamedTuple):
    """News of an answer: new tokens, and how it ended if it has."""

    ids: list[int]
    scores: list[TokenScore]
    finish: str | None = None
    error: RequestError | None = None

    @property
    def is_last(self) -> bool:
        """Whether nothing follows."""
        return self.finish is not None or self.error is not None


@dataclass(eq=False)
class Work:
    """One answer that is to be given.

    Args:
        prompt: its ids.
        settings: how its tokens are chosen.
        stop_ids: tokens that end it.
        adapter: number of the adapter, 0 for the base.
        client: whose share of the slots it takes.
        deadline: when it is given up, by `time.monotonic`.
    """

    prompt: EncodedPrompt
    settings: ChoiceSettings
    stop_ids: Collection[int]
    adapter: int
    client: str
    deadline: float
    slot: int | None = None
    row: Row | None = None
    """What its slot holds, once its prompt has been read."""
    is_cancelled: bool = False
    submitted: float = field(default_factory=time.monotonic)
    news: Any = None
    """Where its updates go; the receiver's."""


Deliver = Callable[[Sequence[tuple[Work, Update]]], None]


class Scheduler:
    """Runs works in the slots of a decoder until it is closed.

    Args:
        decoder: with separate rows.
        num_slots: answers that run at a time.
        max_waiting: answers that may wait for a slot.
        deliver: called in the scheduler's thread with all updates of a step.
    """

    def __init__(self, decoder: Decoder, num_slots: int, max_waiting: int, deliver: Deliver):
        self.decoder, self.max_waiting, self._deliver = decoder, max_waiting, deliver
        self.slots = Slots(decoder, num_slots)
        self.overlaps = decoder.device.type == "cuda"
        """Whether the next step or pass is launched before the tokens of the last are read."""
        self.running: dict[int, Work] = {}
        self.num_tokens = self.num_prompt_tokens = self.num_steps = 0
        self._waiting: dict[str, deque[Work]] = {}
        self._num_waiting = 0
        self._more_may_come = False
        self._cancelled: list[Work] = []
        self._news: list[tuple[Work, Update]] = []
        self._is_launching = False
        self._changed = threading.Condition()
        self._is_closed = False
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread; works that have not ended get an error."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether works are being run."""
        return self._thread.is_alive() and self.failure is None

    @property
    def num_waiting(self) -> int:
        """Works without a slot."""
        return self._num_waiting

    @property
    def num_open(self) -> int:
        """Works that have not ended."""
        return self._num_waiting + len(self.running)

    def submit(self, works: Sequence[Work], *, more_may_come: bool = False) -> None:
        """Let works wait for slots; from any thread.

        Args:
            works: that wait.
            more_may_come: they fill a pass by themselves, or wait until `no_more_come`.

        Raises:
            RequestError: too many wait already, or the thread has ended. None of them waits then.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._is_launching, _SECONDS_OF_A_LAUNCH)
            if self._is_closed or self.failure is not None:
                raise unavailable("the server is not answering any more")
            free = len(self.slots.rows) - len(self.running)
            if self._num_waiting + len(works) > self.max_waiting + free:
                raise overloaded(
                    f"{self._num_waiting} answers wait already, and {self.max_waiting} may; try "
                    "again later",
                    "queue_full",
                )
            for work in works:
                self._waiting.setdefault(work.client, deque()).append(work)
            self._num_waiting += len(works)
            self._more_may_come = more_may_come
            self._changed.notify_all()

    def no_more_come(self) -> None:
        """Let works begin that do not fill a pass; from any thread."""
        with self._changed:
            self._more_may_come = False
            self._changed.notify_all()

    def cancel(self, work: Work) -> None:
        """Give a work up, from any thread: its slot is free before the next step."""
        with self._changed:
            work.is_cancelled = True
            self._cancelled.append(work)
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # told to whoever waits, and by /health
            self.failure = error
            raise
        finally:
            with self._changed:
                for work in [*self.running.values(), *self._all_waiting()]:
                    self._tell(work, Update([], [], error=unavailable("the server has stopped")))
                self.running.clear()
                self._waiting.clear()
                self._num_waiting = 0
            self._flush()

    def _loop(self) -> None:
        pending: Notes | None = None  # the tokens of the last step, where steps overlap
        while True:
            with self._changed:
                while not (self._is_closed or self._may_begin or self._cancelled or self.running):
                    self._changed.wait()
                if self._is_closed:
                    return
                self._drop_cancelled()
            self._expire()
            for _ in range(MOST_PASSES_BETWEEN_STEPS if self.running else MOST_PASSES_AT_FIRST):
                if not (group := self._next_group()):
                    break
                pending = self._begin(group, pending)
            if self.slots.num_live:
                pending = self._step(pending)
            elif pending is not None:
                self._read(pending)
                pending = None

    def _begin(self, group: Sequence[Work], pending: Notes | None) -> Notes | None:
        """Read the prompts of works; the notes that are still to be read.

        Where steps overlap, the host prepares a pass while the device runs the last one. But a slot
        is given again only when all that was noted of it is read, or its fault would be missed.
        """
        if pending is not None and any(work.slot in pending.rows for work in group):
            self._read(pending)
            pending = None
        with self._launching():
            self._admit(group)
        return self._read_all_but_last(pending)

    @contextmanager
    def _launching(self) -> Iterator[None]:
        """Let whoever submits works wait while the host launches kernels.

        Each of torch's functions lets go of the interpreter and waits for it again: beside a thread
        that reads requests, a pass took ten times as long to launch, and the GPU stood still.
        """
        self._is_launching = self.overlaps
        try:
            yield
        finally:
            with self._changed:
                self._is_launching = False
                self._changed.notify_all()

    def _step(self, pending: Notes | None) -> Notes | None:
        """One more token for each row; the notes that are still to be read."""
        if not self.slots.step(1):  # a row is at its end, as the pending notes will say
            assert pending is not None
            self._read(pending)
            return None
        self.num_steps += 1
        return self._read_all_but_last(pending)

    def _read_all_but_last(self, pending: Notes | None) -> Notes | None:
        """Note what was launched last, and read what was noted before; the notes that are left."""
        notes = self.slots.note()
        for each in filter(None, (pending, None if self.overlaps else notes)):
            self._read(each)
        return notes if self.overlaps else None

    def _drop_cancelled(self) -> None:
        """Free the slots of works that nobody waits for any more."""
        for work in self._cancelled:
            if work.slot is not None and self.running.get(work.slot) is work:
                self.slots.release(work.slot)
                del self.running[work.slot]
            elif (queue := self._waiting.get(work.client)) and work in queue:
                queue.remove(work)
                self._num_waiting -= 1
        self._cancelled.clear()

    @property
    def _may_begin(self) -> bool:
        """Whether works wait, and either fill a pass or are not followed by others at once."""
        if not self._num_waiting or not self._more_may_come:
            return self._num_waiting > 0
        first = min(self._all_waiting(), key=lambda work: work.submitted)
        return self._num_waiting >= self.decoder.most_prompts(len(first.prompt.ids))

    def _all_waiting(self) -> list[Work]:
        return [work for queue in self._waiting.values() for work in queue]

    def _expire(self) -> None:
        """Give up what has taken too long."""
        now = time.monotonic()
        error = RequestError(
            408, "the answer took longer than this server allows", code="timeout", kind="timeout"
        )
        for slot, work in list(self.running.items()):
            if work.deadline < now:
                self.slots.release(slot)
                del self.running[slot]
                self._tell(work, Update([], [], error=error))
        with self._changed:
            for queue in self._waiting.values():
                for work in [work for work in queue if work.deadline < now]:
                    queue.remove(work)
                    self._num_waiting -= 1
                    self._tell(work, Update([], [], error=error))
        self._flush()

    def _next_group(self) -> list[Work]:
        """Works to read in one pass: the next one's turn, and others whose pass is as wide.

        The next is of the client that has the fewest answers running, of several such the one that
        has waited longest.
        """
        with self._changed:
            if not self._may_begin:
                return []
            num_free = len(self.slots.rows) - self.slots.num_live
            running = Counter(work.client for work in self.running.values())
            group: list[Work] = []
            width = most = 0
            passed_over: set[str] = set()
            while len(group) < num_free and self._num_waiting and (not group or len(group) < most):
                turns = [
                    (running[client], queue[0].submitted, client)
                    for client, queue in self._waiting.items()
                    if queue and client not in passed_over
                ]
                if not turns:
                    break
                client = min(turns)[2]
                work = self._waiting[client][0]
                length = len(work.prompt.ids)
                if not group:
                    most = self.decoder.most_prompts(length)
                    width = self.decoder.reads(length, 1)[1]
                elif self.decoder.reads(length, 1)[1] != width:
                    passed_over.add(client)
                    continue
                self._waiting[client].popleft()
                self._num_waiting -= 1
                running[client] += 1
                group.append(work)
            self._waiting = {client: queue for client, queue in self._waiting.items() if queue}
            free = [slot for slot, row in enumerate(self.slots.rows) if row is None]
            for slot, work in zip(free, group, strict=False):
                work.slot = slot
                self.running[slot] = work
        return group

    def _admit(self, group: Sequence[Work]) -> None:
        """Read the prompts of works into their slots; where that fails, one by one.

        What no request should bring about is printed, and ends the one that did. A device that
        fails, a RuntimeError of torch, would fail the next one too: it ends the server.
        """
        try:
            self.slots.admit(
                [work.slot for work in group if work.slot is not None],
                [work.prompt for work in group],
                [work.settings for work in group],
                [work.stop_ids for work in group],
                [work.adapter for work in group],
            )
            for work in group:
                work.row = None if work.slot is None else self.slots.rows[work.slot]
            self.num_prompt_tokens += sum(len(work.prompt.ids) for work in group)
        except Exception as error:
            is_short = isinstance(error, RuntimeError) and is_out_of_memory(error)
            if isinstance(error, RuntimeError) and not is_short:
                raise
            if self.decoder.device.type == "cuda":
                torch.cuda.empty_cache()
            if len(group) > 1:
                for work in group:
                    self._admit([work])
                return
            (work,) = group
            assert work.slot is not None
            self.running.pop(work.slot, None)
            length = len(work.prompt.ids) + work.settings.max_new_tokens
            refusal = failed(
                f"there is no memory for {length} tokens of prompt and answer; ask for less",
                "out_of_memory",
            )
            if not is_short:
                traceback.print_exception(error)
                refusal = failed("the server could not read this prompt")
            self._tell(work, Update([], [], error=refusal))

    def _read(self, notes: Notes) -> None:
        """Hand out the tokens that were noted."""
        made = self.slots.read(notes)
        for slot in notes.rows:
            work = self.running.get(slot)
            if work is None or work.row is not notes.rows[slot][0]:
                continue  # what was noted is of one before it, who has ended
            if slot in self.slots.faulty:
                del self.running[slot]
                message = "the model's scores were not finite; bfloat16 or float32 may help"
                self._tell(work, Update([], [], error=failed(message, "not_finite")))
                continue
            ids = made[slot]
            finish = None
            if self.slots.rows[slot] is None:
                del self.running[slot]
                finish = STOP if ids and ids[-1] in work.stop_ids else LENGTH
            if ids or finish:
                self.num_tokens += len(ids)
                self._tell(work, Update(ids, self.slots.scores.get(slot, []), finish))
        self._flush()

    def _tell(self, work: Work, update: Update) -> None:
        self._news.append((work, update))

    def _flush(self) -> None:
        if self._news:
            news, self._news = self._news, []
            self._deliver(news)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not allocate, on a GPU or on a CPU."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return "DefaultCPUAllocator" in str(error) and "allocate" in str(error)
