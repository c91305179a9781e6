"""Adapters of ChatGLM-6B whose queries, keys and values are linears of their own.

A script of 2023 (`QKV_layer` of ChatGLM-finetune-LoRA) cut ``query_key_value`` into thirds of its
rows, whatever heads they belong to, called them ``linear_q``, ``linear_k`` and ``linear_v``, and
saved their LoRA as a `.pt`. PEFT had put a ``model`` between.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from glmtune.errors import UserError
from glmtune.models.chatglm.naming import THIRD
from glmtune.models.low_rank import join_updates
from glmtune.ops.lora import LowRank

_THIRDS = ("q", "k", "v")


def to_own(updates: Mapping[str, LowRank], config: Any = None) -> dict[str, LowRank]:
    """Updates of thirds as updates of the whole linear; others as they are.

    Args:
        updates: by module.
        config: of the base; None to read its size off the tensors.

    Raises:
        UserError: a third is not one of this base, or the whole linear is adapted as well.
    """
    found: dict[str, LowRank] = {}
    thirds: dict[str, dict[str, LowRank]] = defaultdict(dict)
    for module, update in updates.items():
        if place := THIRD.fullmatch(module):
            thirds[place[1]][place[2]] = update
        else:
            found[module] = update
    for module, parts in thirds.items():
        (rows, *others) = {len(part.b_OR) for part in parts.values()}
        wanted = config.hidden_size if config else rows
        if others or rows != wanted or module in found:
            raise UserError(
                f"{module}: its parts {', '.join(parts)} have {sorted({rows, *others})} rows, "
                f"{wanted} each are wanted, and none beside an update of the whole; pass an "
                "adapter of this base"
            )
        found[module] = join_updates([parts.get(name) for name in _THIRDS], (rows,) * 3)
    return found
