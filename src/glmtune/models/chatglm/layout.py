"""What the ids of a row say about it: where it is padded, where its prefix ends, its positions.

A row is ``text ids, [gMASK], <sop>, answer ids, <eop>`` with padding at either end. Shapes: B rows
of a batch, S tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from glmtune.models.chatglm.configuration import ChatGLMConfig


class Layout(NamedTuple):
    """The layout of a batch of whole rows."""

    valid_BS: Tensor
    """True where a token is real, false for padding."""
    prefix_end_B: Tensor
    """Column of the first ``<sop>``, which is the first token after the prefix."""
    position_ids_B2S: Tensor
    """The two position streams: place in the prefix, and place in the answer."""


def read_layout(
    input_ids_BS: Tensor, config: ChatGLMConfig, valid_BS: Tensor | None = None
) -> Layout:
    """Derive mask and positions from the ids of whole rows.

    With c prefix tokens and [gMASK] at place m, the position stream counts 0..c-1 over the prefix
    and stays at m from ``<sop>`` on; the block stream is 0 over the prefix and counts 1, 2, 3...
    from ``<sop>`` on. In revision v1.0 ``<sop>`` itself has position c. Padding does not count.
    Source: the published code, as held by the golden vectors.

    Args:
        input_ids_BS: whole rows, padded at the right or the left.
        config: gives the special ids and the revision.
        valid_BS: 1 or true for real tokens; by default every id but ``<pad>`` is real.

    Raises:
        ValueError: a row has no ``<sop>``, or neither [gMASK] nor [MASK] before it.
    """
    valid_BS = input_ids_BS.ne(config.pad_token_id) if valid_BS is None else valid_BS.bool()
    column_S = torch.arange(input_ids_BS.shape[1], device=input_ids_BS.device)

    is_sop_BS = (input_ids_BS == config.bos_token_id) & valid_BS
    prefix_end_B = is_sop_BS.int().argmax(-1)
    in_prefix_BS = column_S < prefix_end_B[:, None]
    is_gmask_BS = (input_ids_BS == config.gmask_token_id) & in_prefix_BS
    is_mask_BS = (input_ids_BS == config.mask_token_id) & in_prefix_BS
    has_gmask_B1 = is_gmask_BS.any(-1, keepdim=True)
    is_target_BS = torch.where(has_gmask_B1, is_gmask_BS, is_mask_BS)
    _check_specials(is_sop_BS, is_target_BS)

    start_B1 = valid_BS.int().argmax(-1, keepdim=True)
    target_B1 = is_target_BS.int().argmax(-1, keepdim=True) - start_B1
    place_BS = (column_S - start_B1).clamp(min=0)
    position_BS = torch.where(in_prefix_BS, place_BS, target_B1)
    if config.sop_in_prefix:
        # v1.0 counted <sop> as the prompt's last token and turned to [gMASK] only after it.
        is_first_sop_BS = column_S == prefix_end_B[:, None]
        position_BS = torch.where(is_first_sop_BS & has_gmask_B1, place_BS, position_BS)
    block_BS = (column_S - prefix_end_B[:, None] + 1).clamp(min=0)
    return Layout(valid_BS, prefix_end_B, torch.stack((position_BS, block_BS), dim=1))


def _check_specials(is_sop_BS: Tensor, is_target_BS: Tensor) -> None:
    for found_BS, name in ((is_sop_BS, "<sop>"), (is_target_BS, "[gMASK] before <sop>")):
        missing = (~found_BS.any(-1)).nonzero().flatten().tolist()
        if missing:
            raise ValueError(
                f"input_ids: row {missing[0]} has no {name}; encode prompts with this model's own "
                "tokenizer, special ids included, and cut long text before them, not through them"
            )
