"""A pass that reads prompts into the slots of a running batch.

Shapes: B rows of a pass, S columns of the longest prompt, K columns of the buffers, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from glmtune.models.decoding import Angles, KeyValueCache, prefill
from glmtune.models.packed import move
from glmtune.ops.attention import prefix_lm_mask

if TYPE_CHECKING:
    from glmtune.generation.decoder import Decoder


class Placed(NamedTuple):
    """A prompt's ids, and where it is read to."""

    ids: list[int]
    slot: int
    adapter: int


class PromptPass(NamedTuple):
    """What a pass is given, on the decoder's device."""

    table_BX: Tensor
    """Ids, padded with the last one, then what the properties name."""
    angles_BS: Angles
    """The angles of the prompts' columns, in the type of the weights."""

    @classmethod
    def of(
        cls,
        decoder: "Decoder",
        prompts: Sequence[Placed],
        num_rows: int,
        width: int,
        num_columns: int,
    ) -> tuple["PromptPass", Angles]:
        """A pass for some prompts, and the angles of all columns of its rows.

        All is copied to the device at once, and the host does not wait for it.

        Args:
            decoder: with the weights.
            prompts: at most as many as the pass has rows; others repeat the last prompt.
            num_rows: of the pass.
            width: columns of the pass, as many as the longest prompt has tokens or more.
            num_columns: of the buffers.
        """
        # Padding repeats the last id, so that no other token counts as seen.
        rows = [[*p.ids, *p.ids[-1:] * (width - len(p.ids))] for p in prompts]
        rows += rows[-1:] * (num_rows - len(rows))
        places = [[len(p.ids), p.slot, p.adapter] for p in prompts]
        places += places[-1:] * (num_rows - len(places))
        ids_BS, place_B3 = torch.tensor(rows), torch.tensor(places)
        layout = decoder.block.layout(F.pad(ids_BS, (0, num_columns - width)), decoder.config)
        parts = ids_BS, place_B3, layout.prefix_end_B[:, None], layout.positions.flatten(1)
        sent = move(torch.cat(parts, 1), decoder.device)
        table_BX, positions = sent.tensor_split([width + 4], 1)
        angles = decoder.block.angles(
            positions.unflatten(1, layout.positions.shape[1:]), decoder.config
        )
        dtype = decoder.weights.final_norm.weight.dtype
        angles = Angles(*(angle.to(dtype) for angle in angles))
        return cls(table_BX, Angles(*(angle[:, :width] for angle in angles))), angles

    @property
    def ids_BS(self) -> Tensor:
        """The prompts."""
        return self.table_BX[:, :-4]

    @property
    def length_B(self) -> Tensor:
        """Tokens of each prompt."""
        return self.table_BX[:, -4]

    @property
    def slot_B(self) -> Tensor:
        """Where each is read to."""
        return self.table_BX[:, -3]

    @property
    def adapter_B1(self) -> Tensor:
        """Numbers of their adapters."""
        return self.table_BX[:, -2:-1]

    @property
    def prefix_end_B(self) -> Tensor:
        """See `RowLayout`."""
        return self.table_BX[:, -1]


def read_prompts(
    decoder: "Decoder", given: PromptPass, cache: KeyValueCache, row_B: Tensor | None
) -> Tensor:
    """Read the prompts of a pass; their next-token logits ``(B, V)``.

    Nothing here may depend on a tensor's value on the host.

    Args:
        decoder: with the weights.
        given: the pass.
        cache: see `prefill`.
        row_B: see `prefill`.
    """
    if decoder.adapters is not None:
        decoder.adapters.turn(given.adapter_B1)
    # Padding at the end comes after everything that a token sees.
    mask_B1SS = prefix_lm_mask(given.prefix_end_B, torch.ones_like(given.ids_BS, dtype=torch.bool))
    if decoder.prefix is not None:
        mask_B1SS = F.pad(mask_B1SS, (decoder.prefix.keys.shape[3], 0), value=True)
    return prefill(
        decoder.weights,
        decoder.block,
        given.ids_BS,
        given.length_B,
        mask_B1SS,
        given.angles_BS,
        cache,
        row_B,
        row_B is not None and decoder.reads_in_few_kernels,
    )


class CapturedPass(NamedTuple):
    """A pass of one size as a CUDA graph, which the host launches at once."""

    given: PromptPass
    """What the graph reads, always in the same place."""
    replay: Callable[[], None]
    logits_BV: Tensor
    """What the graph writes beside the cache."""

    @classmethod
    def of(
        cls,
        graph: Callable[[Callable[[], Tensor], int], Any],
        decoder: "Decoder",
        given: PromptPass,
        cache: KeyValueCache,
    ) -> "CapturedPass":
        """Capture a pass; the slots that it is given are written meanwhile.

        Args:
            graph: captures work after running it a number of times; see `Slots`.
            decoder: with separate rows.
            given: the first pass of this size.
            cache: of all slots.
        """
        table_BX, angles = given
        kept = PromptPass(table_BX.clone(), Angles(*(angle.clone() for angle in angles)))
        work = partial(read_prompts, decoder, kept, cache, kept.slot_B)
        return cls(kept, *graph(work, 1))

    def read(self, given: PromptPass) -> Tensor:
        """Read the prompts of another pass; logits ``(B, V)`` that the next one overwrites."""
        self.given.table_BX.copy_(given.table_BX)
        for kept, new in zip(self.given.angles_BS, given.angles_BS, strict=True):
            kept.copy_(new)
        self.replay()
        return self.logits_BV
