"""How ChatGLM-6B lays out a row of training."""

from typing import Any

from glmtune.data.row_rule import RowRule, Special


def row_rule(ids: Any) -> RowRule:
    """How rows are laid out, of what names the special ids: a configuration or a tokenizer.

    A row is ``text ids, [gMASK], <sop>, answer ids, <eop>``. All before ``<sop>`` is seen in both
    directions, and ``<sop>`` is the first supervised token, as the published code has it.
    """
    eos = ids.eos_token_id
    return RowRule(
        after_prompt=(
            Special("gmask", "[gMASK]", ids.gmask_token_id),
            Special("bos", "<sop>", ids.bos_token_id),
        ),
        end=(Special("eos", "<eop>", eos[0] if isinstance(eos, list) else eos),),
        pad_id=ids.pad_token_id,
        prompt_sees_all=True,
        positions="stay_late" if getattr(ids, "sop_in_prefix", False) else "stay",
    )
