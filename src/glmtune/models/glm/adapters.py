"""Adapters of the younger family from one naming into another; see `naming`.

The fused ``query_key_value`` becomes q_proj, k_proj and v_proj with one A and B cut by rows.
Linears that are one in the other naming become one, of up to the sum of their ranks.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from glmtune.errors import UserError
from glmtune.models.glm.mapping import (
    FUSED,
    GATE_UP,
    HALVES,
    MODULES,
    OWN_LAYER,
    PUBLISHED_LAYER,
    QKV,
    sizes_of_qkv,
)
from glmtune.models.glm.naming import layer_and_linear
from glmtune.models.low_rank import cut_update, join_updates
from glmtune.ops.lora import LowRank

_QUERY, *_KEY_AND_VALUE = QKV
_OUTPUT, _OUTPUT_PUBLISHED = "self_attn.o_proj", "self_attention.dense"
_PUBLISHED = {ours: theirs for theirs, ours in MODULES.items()}


def to_own(updates: Mapping[str, LowRank], config: Any = None) -> dict[str, LowRank]:
    """Updates of linears in any naming, as those of transformers' classes.

    Args:
        updates: by module; those that no naming knows stay as they are.
        config: of the base; None to read its sizes off the tensors.

    Raises:
        UserError: a linear is there in two namings, or sizes are not those of the base.
    """
    found: dict[str, LowRank] = {}
    halves: dict[int, dict[str, LowRank]] = defaultdict(dict)

    def add(module: str, update: LowRank) -> None:
        if module in found:
            raise UserError(
                f"adapts {module} twice, under two names; take one of them out of the file"
            )
        found[module] = update

    for module, update in updates.items():
        if place := layer_and_linear(module, PUBLISHED_LAYER):
            number, linear = place
            if linear == FUSED:
                parts = cut_update(update, _rows_of_fused(module, update, updates, config))
                for ours, part in zip(QKV, parts, strict=True):
                    add(f"{OWN_LAYER}{number}.{ours}", part)
                continue
            if linear in MODULES:
                add(f"{OWN_LAYER}{number}.{MODULES[linear]}", update)
                continue
        elif (place := layer_and_linear(module, OWN_LAYER)) and place[1] in HALVES:
            halves[place[0]][place[1]] = update
            continue
        add(module, update)
    for number, of_layer in halves.items():
        both = [of_layer.get(half) for half in HALVES]
        (rows, *others) = {len(part.b_OR) for part in of_layer.values()}
        wanted = config.intermediate_size if config else rows
        if others or rows != wanted:
            raise UserError(
                f"gate_proj and up_proj of layer {number} have {sorted({rows, *others})} rows, but "
                f"{wanted} each are wanted; pass an adapter of this base"
            )
        add(f"{OWN_LAYER}{number}.{GATE_UP}", join_updates(both, (rows, rows)))
    return found


def to_published(updates: Mapping[str, LowRank], config: Any = None) -> dict[str, LowRank]:
    """Updates of linears of transformers' classes, as those of the publisher's code.

    Args:
        updates: by module, all of them of transformers' classes.
        config: of the base; None to read its sizes off the tensors.

    Raises:
        UserError: sizes are not those of the base, or the tensors do not say them.
    """
    found: dict[str, LowRank] = {}
    fused: dict[int, dict[str, LowRank]] = defaultdict(dict)
    for module, update in updates.items():
        place = layer_and_linear(module, OWN_LAYER)
        assert place, f"{module} is no linear of a layer"
        number, linear = place
        if linear in QKV:
            fused[number][linear] = update
        else:
            found[f"{PUBLISHED_LAYER}{number}.{_PUBLISHED[linear]}"] = update
    if not fused:
        return found
    rows = sizes_of_qkv(config) if config else _rows_of_parts(updates)
    for number, of_layer in fused.items():
        for linear, wanted in zip(QKV, rows, strict=True):
            if linear in of_layer and len(of_layer[linear].b_OR) != wanted:
                raise UserError(
                    f"{OWN_LAYER}{number}.{linear} has {len(of_layer[linear].b_OR)} rows, but "
                    f"{wanted} are wanted; pass the base it was trained on as --base"
                )
        parts = [of_layer.get(linear) for linear in QKV]
        found[f"{PUBLISHED_LAYER}{number}.{FUSED}"] = join_updates(parts, rows)
    return found


def to_apart(updates: Mapping[str, LowRank], config: Any = None) -> dict[str, LowRank]:
    """Updates of linears of transformers' classes with gate_proj and up_proj apart, as vLLM reads.

    Both have the A of the whole, and half the rows of its B each.
    """
    found: dict[str, LowRank] = {}
    for module, update in updates.items():
        place = layer_and_linear(module, OWN_LAYER)
        if not place or place[1] != GATE_UP:
            found[module] = update
            continue
        for half, b_OR in zip(HALVES, update.b_OR.chunk(2), strict=True):
            found[f"{OWN_LAYER}{place[0]}.{half}"] = LowRank(
                update.a_RI.clone(), b_OR.clone(), update.scale
            )
    return found


def _rows_of_fused(
    module: str, update: LowRank, updates: Mapping[str, LowRank], config: Any
) -> tuple[int, int, int]:
    """Rows of queries, keys and values in the fused linear.

    Without a configuration there are as many of queries as numbers that the output linear reads, or
    else the hidden size, as in every published model.
    """
    num_rows = len(update.b_OR)
    if config:
        rows = sizes_of_qkv(config)
        if sum(rows) != num_rows:
            raise UserError(
                f"{module} has {num_rows} rows, but queries, keys and values of this base have "
                f"{sum(rows)}; pass the base it was trained on"
            )
        return rows
    of_output = _inputs(updates, PUBLISHED_LAYER, (_OUTPUT_PUBLISHED,))
    of_queries = [*of_output, update.a_RI.shape[1]][0]
    of_keys, rest = divmod(num_rows - of_queries, 2)
    if rest or of_keys <= 0:
        raise UserError(
            f"{module} has {num_rows} rows, which are not {of_queries} of queries and as many of "
            "keys as of values; pass the base it was trained on as --base"
        )
    return of_queries, of_keys, of_keys


def _rows_of_parts(updates: Mapping[str, LowRank]) -> tuple[int, int, int]:
    """The same, of q_proj, k_proj and v_proj; see `_rows_of_fused`."""
    of_queries = [
        *_outputs(updates, OWN_LAYER, (_QUERY,)),
        *_inputs(updates, OWN_LAYER, (_OUTPUT,)),
        *_inputs(updates, OWN_LAYER, QKV),
    ]
    of_keys = _outputs(updates, OWN_LAYER, _KEY_AND_VALUE)
    if not of_keys:
        raise UserError(
            "adapts q_proj alone, which does not say how many rows keys and values have; pass the "
            "base it was trained on as --base"
        )
    return of_queries[0], of_keys[0], of_keys[0]


def _outputs(updates: Mapping[str, LowRank], begin: str, linears: Collection[str]) -> list[int]:
    return [len(update.b_OR) for update in _those(updates, begin, linears)]


def _inputs(updates: Mapping[str, LowRank], begin: str, linears: Collection[str]) -> list[int]:
    return [update.a_RI.shape[1] for update in _those(updates, begin, linears)]


def _those(
    updates: Mapping[str, LowRank], begin: str, linears: Collection[str]
) -> Iterator[LowRank]:
    """The updates of some linears, of all layers."""
    for module, update in updates.items():
        if (place := layer_and_linear(module, begin)) and place[1] in linears:
            yield update
