"""Derive the layout of rows from their ids: padding, the end of the prefix, positions.

A row is ``text ids, [gMASK], <sop>, answer ids, <eop>`` with padding at either end. Shapes: B rows
of a batch, S tokens, H hidden.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache

from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.ops.attention import prefix_lm_mask
from glmtune.ops.loss import IGNORED

_CACHED_ROWS = "glmtune_rows"  # attribute of a transformers cache that holds its `CachedRows`


class Layout(NamedTuple):
    """The layout of a batch of whole rows."""

    valid_BS: Tensor
    """True where a token is real, false for padding."""
    prefix_end_B: Tensor
    """Column of the first ``<sop>``, which is the first token after the prefix."""
    position_ids_B2S: Tensor
    """The two position streams: place in the prefix, and place in the answer."""
    target_B: Tensor
    """Place of [gMASK] (or [MASK]) in the prefix, where the position stream stays in the answer."""


class CachedRows(NamedTuple):
    """The layout of the rows in a cache, as far as their next tokens need it."""

    prefix_end_B: Tensor
    """Column of the cache that holds ``<sop>``."""
    target_B: Tensor
    """See `Layout`."""
    valid_BK: Tensor
    """True where a column held a real token when the rows were read."""
    longest_prefix: int
    """The largest of `prefix_end_B`: a cache that was cut to less holds no whole prefix."""

    def keep(self, cache: Cache) -> None:
        """Attach this to a cache, where `of` finds it."""
        setattr(cache, _CACHED_ROWS, self)

    @classmethod
    def of(cls, cache: Cache) -> "CachedRows | None":
        """The `CachedRows` attached to a cache, if any."""
        return getattr(cache, _CACHED_ROWS, None)

    @classmethod
    def of_whole(cls, layout: Layout, num_past: int, valid_BK: Tensor) -> "CachedRows":
        """Derive it from whole rows after `num_past` columns that every token sees."""
        prefix_end_B = layout.prefix_end_B + num_past
        return cls(prefix_end_B, layout.target_B, valid_BK.bool(), int(prefix_end_B.max()))

    def positions(self, num_past: int, num_new: int) -> Tensor:
        """``(B, 2, S)`` of the next tokens.

        Raises:
            ValueError: the cache was cut to a part of its prefix.
        """
        if num_past < self.longest_prefix:
            raise ValueError(
                f"past_key_values: ends at column {num_past}, inside a prefix of "
                f"{self.longest_prefix}, which every token sees as a whole; start from an empty "
                "cache with whole rows"
            )
        column_S = torch.arange(num_past, num_past + num_new, device=self.prefix_end_B.device)
        block_BS = column_S - self.prefix_end_B[:, None] + 1
        return torch.stack((self.target_B[:, None].expand_as(block_BS), block_BS), dim=1)


def read_layout(
    input_ids_BS: Tensor,
    config: ChatGLMConfig,
    valid_BS: Tensor | None = None,
    name: str = "input_ids",
) -> Layout:
    """Derive mask and positions from the ids of whole rows.

    With c prefix tokens and [gMASK] at place m, the position stream counts 0..c-1 over the prefix
    and stays at m from ``<sop>`` on; the block stream is 0 over the prefix and counts 1, 2, 3...
    from ``<sop>`` on. In revision v1.0 ``<sop>`` itself has position c. Padding does not count.
    Source: the published code; recorded vectors test this.

    Args:
        input_ids_BS: whole rows, padded at the right or the left.
        config: gives the special ids and the revision.
        valid_BS: 1 or true for real tokens; by default every id but ``<pad>`` is real.
        name: of the argument, for errors.

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
    _check_specials(is_sop_BS, is_target_BS, name)

    # Real tokens only: columns have a gap where left padding follows a virtual prompt.
    place_BS = (valid_BS.cumsum(-1) - 1).clamp(min=0)
    target_B1 = place_BS.gather(-1, is_target_BS.int().argmax(-1, keepdim=True))
    position_BS = torch.where(in_prefix_BS, place_BS, target_B1)
    if config.sop_in_prefix:
        # In v1.0 <sop> continues the prompt's positions; only later tokens have [gMASK]'s.
        is_first_sop_BS = column_S == prefix_end_B[:, None]
        position_BS = torch.where(is_first_sop_BS & has_gmask_B1, place_BS, position_BS)
    block_BS = (column_S - prefix_end_B[:, None] + 1).clamp(min=0)
    positions_B2S = torch.stack((position_BS, block_BS), dim=1)
    return Layout(valid_BS, prefix_end_B, positions_B2S, target_B1[:, 0])


def lay_out(
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    embed: Callable[[Tensor], Tensor],
    config: ChatGLMConfig,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: Cache | None = None,
) -> tuple[Tensor, Tensor]:
    """Mask ``(B, 1, S, K)`` and positions ``(B, 2, S)`` of the model's inputs.

    The layout of whole rows is attached to the cache, so that their next tokens need only a mask.
    Whole rows with a filled cache that has no layout attached follow a virtual prompt, as in prefix
    tuning: every token of a row sees it, and positions do not count it.

    Args:
        input_ids: whole rows ``(B, S)``, or the next tokens of cached ones.
        inputs_embeds: ``(B, S, H)`` of the same; without ids, special ids are found in them.
        embed: the model's embedding.
        config: gives the special ids and the revision.
        attention_mask: 1 or true for real tokens, ``(B, P + S)`` with the P columns of the cache;
            it may be left out for whole rows, where only ``<pad>`` is not real. Or a ready mask,
            boolean ``(B, 1, S, K)``.
        position_ids: ready positions ``(B, 2, S)``.
        cache: one of transformers', empty or filled.

    Raises:
        ValueError: a row lacks its special ids; mask or positions have another shape; a cache
            comes without a mask, or ends inside a prefix.
    """
    _check_shapes(attention_mask, position_ids)
    if attention_mask is None or attention_mask.ndim == 2:
        valid_BK, ready_B1SK = attention_mask, None
    else:
        valid_BK, ready_B1SK = None, attention_mask
    if ready_B1SK is not None and position_ids is not None:
        return ready_B1SK, position_ids
    name = "input_ids"
    if input_ids is None:
        assert inputs_embeds is not None
        name, input_ids = "inputs_embeds", special_ids(inputs_embeds, embed, config)
    mask_B1SK, position_ids_B2S = _lay_out_ids(input_ids, config, valid_BK, cache, name)
    return (
        mask_B1SK if ready_B1SK is None else ready_B1SK,
        position_ids_B2S if position_ids is None else position_ids,
    )


def _lay_out_ids(
    input_ids_BS: Tensor,
    config: ChatGLMConfig,
    valid_BK: Tensor | None,
    cache: Cache | None,
    name: str,
) -> tuple[Tensor, Tensor]:
    batch_size, num_new = input_ids_BS.shape
    num_past = 0 if cache is None else int(cache.get_seq_length())
    rows = CachedRows.of(cache) if cache is not None and num_past else None
    if valid_BK is None and (
        rows is not None or (num_past and not bool(input_ids_BS.eq(config.bos_token_id or 0).any()))
    ):
        raise ValueError(
            "past_key_values: pass attention_mask (B, P + S) beside a cache of P columns, which "
            "says what of it is real; or position_ids (B, 2, S) and a boolean attention_mask "
            "(B, 1, S, K)"
        )
    if valid_BK is not None and valid_BK.shape != (batch_size, num_past + num_new):
        raise ValueError(
            f"attention_mask: is of shape {tuple(valid_BK.shape)}, but with {num_past} cached "
            f"columns and {num_new} tokens more it has to be {(batch_size, num_past + num_new)}"
        )
    if rows is not None and len(rows.prefix_end_B) == batch_size:
        prefix_end_B, positions_B2S = rows.prefix_end_B, rows.positions(num_past, num_new)
    else:
        valid_BS = None if valid_BK is None else valid_BK[:, num_past:]
        layout = read_layout(input_ids_BS, config, valid_BS, name)
        prefix_end_B, positions_B2S = layout.prefix_end_B + num_past, layout.position_ids_B2S
        if valid_BK is None:
            valid_BK = F.pad(layout.valid_BS, (num_past, 0), value=True)
        if cache is not None:
            CachedRows.of_whole(layout, num_past, valid_BK).keep(cache)
    assert valid_BK is not None
    mask_B1SK = prefix_lm_mask(prefix_end_B, valid_BK.bool(), num_new)
    if cache is not None:
        num_keys, _ = cache.get_mask_sizes(num_new, 0)
        # A static cache has more columns than tokens so far; the rest is masked.
        mask_B1SK = F.pad(mask_B1SK, (0, num_keys - mask_B1SK.shape[-1]), value=False)
    return mask_B1SK, positions_B2S


def known_mask(
    given_BK: Tensor | None,
    cache: Cache | None,
    input_ids_BS: Tensor,
    num_new: int,
    config: ChatGLMConfig,
) -> Tensor | None:
    """Which columns hold real tokens, also where generation gives no mask: it drops one of ones.

    A filled cache without `CachedRows` gets them here.

    Args:
        given_BK: the mask from generation, if any.
        cache: one of transformers', empty or filled.
        input_ids_BS: whole rows, or only the tokens after given embeddings or after the cache.
        num_new: number of tokens to read.
        config: gives the special ids and the revision.

    Returns:
        `given_BK`, if there is one. Else ``(B, S)`` if the ids are whole rows, which leaves out a
        virtual prompt in the cache: its owner has to extend the mask. Else ``(B, P + S)`` for rows
        in a cache, or None for embeddings, from which `lay_out` derives it.
    """
    num_past = 0 if cache is None else int(cache.get_seq_length())
    num_before = num_past + num_new - input_ids_BS.shape[1]  # columns without ids
    valid_BK = input_ids_BS.ne(config.pad_token_id) if given_BK is None else given_BK
    if cache is None or not num_past:
        return valid_BK if num_before == 0 else given_BK
    if CachedRows.of(cache) is None and num_before == 0:
        layout = read_layout(input_ids_BS, config, valid_BK)
        CachedRows.of_whole(layout, 0, layout.valid_BS).keep(cache)
    rows = CachedRows.of(cache)
    if given_BK is not None or rows is None:
        return given_BK
    num_read = rows.valid_BK.shape[1]
    valid_BK = F.pad(rows.valid_BK, (0, num_past + num_new - num_read), value=True)
    return valid_BK[:, num_before:] if 0 <= num_before < num_read else valid_BK


def _check_shapes(attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
    if position_ids is not None and (position_ids.ndim != 3 or position_ids.shape[1] != 2):
        raise ValueError(
            f"position_ids: is of shape {tuple(position_ids.shape)}, but this model has two "
            "streams of positions, (B, 2, S); leave it out, and they are derived from the ids"
        )
    if attention_mask is None or attention_mask.ndim == 2:
        return
    if attention_mask.ndim != 4 or attention_mask.dtype != torch.bool:
        raise ValueError(
            f"attention_mask: is {str(attention_mask.dtype).removeprefix('torch.')} of shape "
            f"{tuple(attention_mask.shape)}; pass 1 and 0 for real tokens and padding, (B, S), or "
            "booleans that say what each query sees, (B, 1, S, K)"
        )


def special_ids(
    embeds_BSH: Tensor, embed: Callable[[Tensor], Tensor], config: ChatGLMConfig
) -> Tensor:
    """Find the special ids in rows that are given as embeddings.

    Args:
        embeds_BSH: of whole rows; what is not in the table, such as a virtual prompt, is text.
        embed: the model's embedding.
        config: gives the ids of ``<pad>``, [MASK], [gMASK] and ``<sop>``.

    Returns:
        int64 ``(B, S)``: those ids at their places, -1 elsewhere.
    """
    pad, mask, gmask, sop = (
        config.pad_token_id, config.mask_token_id, config.gmask_token_id, config.bos_token_id,
    )  # fmt: skip
    assert sop is not None
    ids = [pad, mask, gmask, sop]
    ids_BS = torch.full(embeds_BSH.shape[:2], -1, device=embeds_BSH.device)
    with torch.no_grad():
        table_JH = embed(torch.tensor(ids, device=embeds_BSH.device)).to(embeds_BSH.dtype)
    for id_, row_H in zip(ids, table_JH, strict=True):
        ids_BS = ids_BS.masked_fill((embeds_BSH == row_H).all(-1), id_)
    return ids_BS


def check_labels(
    labels_BS: Tensor, position_ids_B2S: Tensor, valid_BS: Tensor | None = None
) -> None:
    """Refuse labels outside the answer.

    Tokens of the prefix see each other in both directions, so a label there is visible to the token
    that predicts it, and its loss falls without any effect. ``<sop>`` is the first token that no
    earlier one sees; it is supervised, as in the original's rows. A row with no other label is
    refused, unless it ends there, with an empty answer.

    Args:
        labels_BS: not shifted, `IGNORED` where a token is not supervised.
        position_ids_B2S: their block stream is 0 in the prefix, 1 at ``<sop>``, more behind it.
        valid_BS: true for real tokens, where that is known.

    Raises:
        ValueError: a row has a label before its ``<sop>``, or only there though more follows.
    """
    block_BS = position_ids_B2S[:, 1]
    is_label_BS = labels_BS != IGNORED
    is_early_BS = is_label_BS & (block_BS < 1)
    is_late_BS = is_label_BS & (block_BS > 1)
    is_alone_B = is_label_BS.any(-1) & ~is_late_BS.any(-1)
    if valid_BS is not None:
        is_alone_B &= (valid_BS & (block_BS > 1)).any(-1)
    bad = (is_early_BS.any(-1) | is_alone_B).nonzero().flatten().tolist()
    if bad:
        number = int((is_label_BS & (block_BS < 2))[bad[0]].sum())
        raise ValueError(
            f"labels: row {bad[0]} has {number} at or before its <sop>, where tokens see their "
            "labels and nothing is trained; put the supervised tokens after it (question [gMASK] "
            f"<sop> answer <eop>), and set the labels of the question to {IGNORED}"
        )


def check_answers(valid_BS: Tensor, position_ids_B2S: Tensor) -> None:
    """Refuse training rows without an answer, where no labels are passed.

    Trainer's label smoothing and TRL compute the loss outside the model, so it gets no labels. Rows
    of plain text end with [gMASK] and ``<sop>`` in TRL, since the tokenizer appends them.

    Raises:
        ValueError: a row has no real token after its ``<sop>``.
    """
    bad = (~(valid_BS & (position_ids_B2S[:, 1] > 1)).any(-1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"input_ids: row {bad[0]} has no answer after its <sop>; all of it is prefix, where "
            "nothing is trained; put the answer after <sop> (question [gMASK] <sop> answer <eop>, "
            "as TRL does with messages), or call model.eval() if you do not train"
        )


def _check_specials(is_sop_BS: Tensor, is_target_BS: Tensor, name: str) -> None:
    # Both checks in one transfer, since reading from a device waits for it.
    found_B2 = torch.stack((is_sop_BS.any(-1), is_target_BS.any(-1)), dim=-1)
    for row, column in (~found_B2).nonzero().tolist():
        what = ("<sop>", "[gMASK] before <sop>")[column]
        raise ValueError(
            f"{name}: row {row} has no {what}; encode prompts with this model's own "
            "tokenizer, special ids included, and cut long text before them, not through them"
        )
