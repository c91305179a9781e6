"""The decoder: a model's weights as answering wants them, and batches of prompts that they answer.

A prompt is read once, and then each step reads one token a row and chooses the next; see `slots`
for the rows of a batch and `models.decoding` for what reads them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glmtune.config.groups import AnswerSettings, DecodingSettings
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

TOKENS_PER_LOOK = 8
"""Steps that a GPU is given before the host looks at what came out, so that neither waits."""


def find_stop_ids(model: Any) -> list[int]:
    """The ids at which an answer ends, as the model's generation_config or config names them."""
    for config in (model.generation_config, model.config):
        stop = config.eos_token_id
        if stop is not None:
            return [stop] if isinstance(stop, int) else list(stop)
    raise AssertionError("the model names no eos_token_id")


class Decoder:
    """Answers batches of prompts with a model as it stands when this is made.

    An adapter that is disabled then is not applied, also if it is enabled later.

    Args:
        model: in evaluation mode, plain or in PEFT's wrapping.
        stop_ids: tokens at which an answer ends.
        bits: 8 or 4 round the linears for speed; see `read_weights`.
        merge: merge the adapter into copies of the weights; see there.
        compiled: compile the layers of the one-token step, which takes a minute and is faster for
            more rows than the kernels are for.
        device: where to answer; by default where the model is. A model that waits in CPU memory is
            brought to a GPU a linear at a time, so that there it takes its rounded size.
        beside: a decoder of the same model with the same settings; what both read alike is shared.

    Raises:
        UserError: the weights cannot be had in so few bits, or the device lacks something, or the
            model's family has no decoding.
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
    ):
        self.config: Any = model.config
        family = family_of(self.config)
        self.block, self.shape = family.native().decoding, family.shape(self.config)
        self.stop_ids = stop_ids
        self.device: torch.device = device or model.device
        check_decoding(self.device, bits, compiled)
        self._linears: dict[tuple[nn.Module, int], Projection] = beside._linears if beside else {}
        with torch.inference_mode():
            self.weights = read_weights(
                model, self.block, bits=bits, merge=merge, device=self.device, known=self._linears
            )
        self.captures = self.device.type == "cuda" and can_be_captured(self.weights)
        self._most_rows_for_kernels = most_rows_for_kernels(
            self.weights, self.block, self.shape.head_dim
        )
        self._slots: Slots | None = None
        self._run_block: Callable[..., Tensor] = self.block.run_block
        self._run_head: Callable[..., Tensor] = run_head
        if compiled:
            # With it, products of one row become reductions that conversions are fused into.
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
        """A decoder that ends answers where the model does, with the bits that are asked for."""
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
        """Steps between two looks of the host."""
        return TOKENS_PER_LOOK if self.device.type == "cuda" else 1

    def functions(self, num_rows: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor], bool]:
        """What reads one token of so many rows: a layer, the head, and whether they need a mask."""
        few_kernels = self.block.run_block_in_few_kernels
        if few_kernels is not None and num_rows <= self._most_rows_for_kernels:
            return few_kernels, run_head_in_few_kernels, False
        return self._run_block, self._run_head, True

    @torch.inference_mode()
    def stream(
        self, prompts: Sequence[EncodedPrompt], settings: AnswerSettings
    ) -> Iterator[list[list[int]]]:
        """The tokens of each prompt's answer, some more at a time, until all have ended.

        An answer ends with its stop id, if it has one; from there on it gets no more tokens.
        `finish` ends one from outside.

        Args:
            prompts: one batch, which must fit into the model's positions with its answers.
            settings: stop strings are the caller's concern.

        Raises:
            UserError: the model's logits are not finite.
        """
        if self._slots is None or len(self._slots.rows) != len(prompts):
            self._slots = None  # frees its memory first
            self._slots = Slots(self, len(prompts))
        slots = self._slots
        for slot in range(len(prompts)):
            slots.release(slot)  # of a batch that was left half way
        slots.admit(0, prompts, [settings] * len(prompts))
        yield slots.look()
        while slots.num_live:
            slots.step(self.tokens_per_look)
            yield slots.look()

    @torch.inference_mode()
    def finish(self, row: int) -> None:
        """Take a row of the batch that is streamed as ended, as for a stop string."""
        assert self._slots is not None, "nothing is streamed"
        self._slots.release(row)
