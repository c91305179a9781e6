"""An adapter in the names and form that another program reads it in."""

import math
from collections import Counter
from dataclasses import replace

import torch

from glmtune.adapters.formats import KEY_PREFIX, SUFFIX_A, SUFFIX_B, Adapter
from glmtune.adapters.naming import beyond_plain, in_names, in_published_names, updates_of
from glmtune.data.files import read_json_object
from glmtune.errors import UserError
from glmtune.export.job import Job
from glmtune.models.hubs import CONFIG_FILE
from glmtune.ops.lora import LowRank


def check_plain(adapter: Adapter, target: str) -> None:
    """Refuse what is more than a product of two matrices for each linear.

    Raises:
        UserError: it is, such as DoRA, biases and modules trained whole.
    """
    if odd := beyond_plain(adapter):
        raise UserError(
            f"--to {target}: {adapter.path} has {', '.join(odd[:3])}, and only plain LoRA on "
            "linears can be written so; use --to hf, which merges it into the base"
        )


def has_published_base(job: Job) -> bool:
    """Whether the base's folder is in the publisher's layout, whose engines use its names."""
    settings = read_json_object(job.base_folder / CONFIG_FILE)
    return job.family.exports.is_published(settings)


def in_names_of_base(job: Job) -> Adapter:
    """The adapter in the names that a program has which loads the base's folder as it is."""
    if has_published_base(job):
        return in_published_names(job.adapter, job.family, job.config)
    return job.adapter


def in_names_of_engine(job: Job, version: tuple[int, ...] | None) -> Adapter:
    """The adapter in the names that vLLM has for its base.

    Args:
        job: what is exported.
        version: of vLLM; None for the newest.
    """
    if has_published_base(job):
        return in_published_names(job.adapter, job.family, job.config)
    names, since = job.family.adapter_names, job.family.exports.vllm_has_own_names_since
    has_own_names = since is not None and (version is None or version >= since)
    if has_own_names or names is None or names.to_apart is None:
        return job.adapter
    return in_names(job.adapter, names.to_apart, job.config)


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
