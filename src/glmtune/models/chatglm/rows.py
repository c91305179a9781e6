"""The layout of ChatGLM-6B's training rows."""

from typing import Any

from glmtune.data.row_rule import RowRule, Special


def row_rule(ids: Any) -> RowRule:
    """How rows are laid out, given a configuration or tokenizer, which has the special ids.

    A row is ``text ids, [gMASK], <sop>, answer ids, <eop>``. Tokens before ``<sop>`` see each other
    in both directions, and ``<sop>`` is the first supervised token, as in the published code.
    """
    eos = ids.eos_token_id
    begin = (
        Special("gmask", "[gMASK]", ids.gmask_token_id),
        Special("bos", "<sop>", ids.bos_token_id),
    )
    return RowRule(
        after_prompt=begin,
        before_text=begin,  # an empty prompt: the whole text is what the model writes
        end=(Special("eos", "<eop>", eos[0] if isinstance(eos, list) else eos),),
        pad_id=ids.pad_token_id,
        prompt_sees_all=True,
        positions="stay_late" if getattr(ids, "sop_in_prefix", False) else "stay",
    )
