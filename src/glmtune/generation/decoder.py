"""The decoder: a model's weights in the form that answering needs, run on batches of prompts.

A prompt is read once, and then each step reads one token a row and chooses the next; see `slots`
for the rows of a batch and `models.decoding` for the functions that read them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glmtune.config.groups import AnswerSettings, DecodingSettings
from glmtune.data.row_rule import as_ids
from glmtune.generation.mixed import MixedAdapters
from glmtune.generation.prompts import EncodedPrompt
from glmtune.generation.slots import Slots
from glmtune.generation.weights import can_be_captured, most_rows_for_kernels, read_weights
from glmtune.hardware import check_decoding
from glmtune.models.decoding import (
    Projection,
    run_head,
    run_head_in_few_kernels,
)
from glmtune.models.families import family_of
from glmtune.models.prefixed import prefix_of

TOKENS_PER_LOOK = 8
"""Steps launched on a GPU before the host reads the results, so that neither waits."""
_COLUMNS_OF_PASS, _TOKENS_OF_PASS = 64, 512


def find_stop_ids(model: Any) -> list[int]:
    """The ids at which an answer ends, by generation_config or config, and by the family."""
    for config in (model.generation_config, model.config):
        if config.eos_token_id is not None:
            named = as_ids(config.eos_token_id)
            rule = family_of(model.config).row_rule(model.config)
            return list(dict.fromkeys([*named, *rule.stops]))
    raise AssertionError("the model names no eos_token_id")


class Decoder:
    """Answers batches of prompts with a model as it is when the decoder is made.

    An adapter or a prefix that is disabled at that time is not applied even if it is enabled later.

    Args:
        model: in evaluation mode, plain or in PEFT's wrapping.
        stop_ids: tokens at which an answer ends.
        bits: 8 or 4 round the linears for speed; see `read_weights`.
        merge: merge the adapter into copies of the weights; see `read_weights`.
        compiled: compile the layers of the one-token step for batches, which takes a minute; on an
            H200 kernels of our own, where there are any, were faster.
        device: where to answer; by default where the model is. A model in CPU memory is moved to a
            GPU a linear at a time, so that it takes only its rounded size there.
        beside: a decoder of the same model with the same settings; weights that both read are
            shared.
        separate: choose forms of all products in which a row's result does not depend on the rows
            beside it, so that an answer is bit for bit what it is alone. On a CPU that is true of
            weights in 16 bits, on a GPU of batches of one size, see `reads`.
        adapters: adapters of the model, which has none on it now; each row of a batch has one.

    Raises:
        UserError: the weights cannot be rounded to that many bits, the device lacks something, or
            the model's family has no decoding.
    """

    def __init__(
        self,
        model: Any,
        stop_ids: Sequence[int],
        *,
        bits: int = 16,
        merge: bool = False,
        compiled: bool = False,
        device: torch.device | None = None,
        beside: "Decoder | None" = None,
        separate: bool = False,
        adapters: MixedAdapters | None = None,
    ):
        self.config: Any = model.config
        family = family_of(self.config)
        self.block, self.shape = family.native().decoding, family.shape(self.config)
        self.stop_ids = stop_ids
        self.separate, self.adapters = separate, adapters
        self.device: torch.device = device or model.device
        check_decoding(self.device, bits, compiled)
        self._linears: dict[tuple[nn.Module, int], Projection] = beside._linears if beside else {}
        with torch.inference_mode():
            self.weights = read_weights(
                model,
                self.block,
                bits=bits,
                merge=merge,
                device=self.device,
                known=self._linears,
                separate=separate,
                adapters=adapters,
            )
        self.prefix = prefix_of(model)
        """Keys and values before those of every row; see `models.prefixed`."""
        assert self.prefix is None or not separate, "a server's rows have no place for a prefix"
        self.captures = self.device.type == "cuda" and can_be_captured(self.weights)
        self._most_rows_for_kernels = most_rows_for_kernels(
            self.weights, self.block, self.shape.head_dim, compiled
        )
        self._slots: Slots | None = None
        self._run_block: Callable[..., Tensor] = self.block.run_block
        self._run_head: Callable[..., Tensor] = run_head
        if compiled:
            # With this option, products of one row become reductions, into which conversions are
            # fused.
            options: dict[str, Any] = {"coordinate_descent_tuning": True}
            self._run_block = torch.compile(self.block.run_block, options=options)
            self._run_head = torch.compile(run_head, options=options)

    @classmethod
    def of(
        cls,
        model: Any,
        settings: DecodingSettings,
        device: torch.device | None = None,
        beside: "Decoder | None" = None,
    ) -> "Decoder":
        """A decoder with the model's own stop ids and the requested bits."""
        return cls(
            model,
            find_stop_ids(model),
            bits=settings.decoder_bits,
            compiled=settings.decode_compile,
            device=device,
            beside=beside,
        )

    @property
    def tokens_per_look(self) -> int:
        """Steps between two reads by the host."""
        return TOKENS_PER_LOOK if self.device.type == "cuda" else 1

    def reads(self, longest: int, num_prompts: int) -> tuple[int, int]:
        """Rows and columns of the pass that reads some prompts.

        Of separate rows, prompts are read together whose passes have as many columns, and on a GPU
        every pass of that many columns has as many rows: libraries choose the kernels of a product
        by its size, and sum in another order in each.

        Args:
            longest: tokens of the longest prompt.
            num_prompts: how many there are.
        """
        if not self.separate:
            return num_prompts, longest
        columns = longest + -longest % _COLUMNS_OF_PASS
        if self.device.type == "cpu":
            return num_prompts, columns
        most = self.most_prompts(longest)
        assert num_prompts <= most, "more prompts than a pass of this width reads"
        return most, columns

    def most_prompts(self, longest: int) -> int:
        """The most prompts of separate rows that one pass reads, of which the longest is given."""
        columns = longest + -longest % _COLUMNS_OF_PASS
        return max(1, -(-_TOKENS_OF_PASS // columns))

    @property
    def reads_in_few_kernels(self) -> bool:
        """Whether prompts of slots are read by the family's `read_block_in_few_kernels`."""
        few_kernels = self.block.read_block_in_few_kernels
        return few_kernels is not None and self._most_rows_for_kernels > 0

    def functions(self, num_rows: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor], bool]:
        """The functions for a token a row: a layer, the head; and whether they need a mask."""
        few_kernels = self.block.run_block_in_few_kernels
        if few_kernels is not None and num_rows <= self._most_rows_for_kernels:
            return few_kernels, run_head_in_few_kernels, False
        return self._run_block, self._run_head, True

    @torch.inference_mode()
    def stream(
        self, prompts: Sequence[EncodedPrompt], settings: AnswerSettings
    ) -> Iterator[list[list[int]]]:
        """Yield new tokens of each prompt's answer, some at a time, until all have ended.

        An answer ends with its stop id, if it has one, and gets no tokens after it. `finish` ends
        an answer from outside.

        Args:
            prompts: one batch, which must fit into the model's positions with its answers.
            settings: how to generate; stop strings are left to the caller.

        Raises:
            UserError: the model's logits are not finite.
        """
        if self._slots is None or len(self._slots.rows) != len(prompts):
            self._slots = None  # frees its memory first
            self._slots = Slots(self, len(prompts))
        slots = self._slots
        for slot in range(len(prompts)):
            slots.release(slot)  # left over from a batch that was not finished
        slots.admit(0, prompts, [settings] * len(prompts))
        yield slots.look()
        while slots.num_live:
            slots.step(self.tokens_per_look)
            yield slots.look()

    @torch.inference_mode()
    def finish(self, row: int) -> None:
        """End one answer of the batch that is being streamed, e.g. at a stop string."""
        assert self._slots is not None, "nothing is streamed"
        self._slots.release(row)
