"""The baseline: transformers and PEFT alone, on a model that transformers has.

Compiled layer by layer, which is the fastest that they do on ordinary settings, or with
bitsandbytes' linears, which graphs break at, as they are. Rows of a pack are one row without
document masks: they see their neighbours.
"""

from collections.abc import Sequence
from copy import copy

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedConfig

from glmtune.bench.timing import times_ms
from glmtune.models.families import family_of
from glmtune.models.family import layers_of
from glmtune.models.quantised import quantise

_WARMUP = 3
_PAD = 0


def glm_peft_rate(
    batches: Sequence[Sequence[int]],
    device: torch.device,
    dtype: torch.dtype,
    config: PreTrainedConfig,
    *,
    targets: Sequence[str] | None = None,
    bits: int | None = None,
) -> float:
    """Real tokens a second of training steps.

    Args:
        batches: the lengths of the rows of each step, which are padded to the longest; all of their
            tokens are supervised.
        device: where.
        dtype: of the base; the adapter is float32.
        config: of a model that transformers has.
        targets: linears with an adapter; by default the family's own choice.
        bits: 8 or 4 for a base that bitsandbytes has quantised.
    """
    family = family_of(config)
    with torch.device(device):
        base = family.native().model_class._from_config(
            copy(config), dtype=dtype, attn_implementation="sdpa"
        )
    layers = layers_of(base)
    if bits:
        quantise(base, layers, bits)
    names = family.targets(tuple(targets) if targets else None, family.shape(config))
    model = get_peft_model(
        base, LoraConfig(r=8, lora_alpha=32, lora_dropout=0.1, target_modules=list(names))
    )
    if device.type == "cuda" and not bits:
        for layer in layers:
            layer.compile()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=device.type == "cuda")
    inputs = [_random_rows(lengths, config.vocab_size, device) for lengths in batches]
    upcoming = iter([*(inputs[i % len(inputs)] for i in range(_WARMUP)), *inputs])

    def step() -> None:
        model(**next(upcoming)).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    times = times_ms(step, device, warmup=_WARMUP, repeats=len(inputs))
    return sum(map(sum, batches)) / sum(times) * 1e3


def _random_rows(
    lengths: Sequence[int], vocab_size: int, device: torch.device
) -> dict[str, Tensor]:
    """Rows of random ids, padded on the right; no mask where there is no padding."""
    longest = max(lengths)
    ids = torch.randint(5, vocab_size, (len(lengths), longest), device=device)
    is_real = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
    if bool(is_real.all()):
        return {"input_ids": ids, "labels": ids}
    ids = ids.where(is_real, _PAD)
    return {
        "input_ids": ids,
        "labels": ids.where(is_real, -100),
        "attention_mask": is_real.long(),
    }
