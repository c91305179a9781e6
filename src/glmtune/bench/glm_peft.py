"""The baseline: transformers and PEFT alone, `GlmForCausalLM` of ChatGLM3-6B's size with LoRA.

Each layer is compiled, the fastest of their usual settings, except with bitsandbytes' linears,
which cause graph breaks. A pack is one long row without document masks, so its rows see each other.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from glmtune.bench.timing import times_ms
from glmtune.models.quantised import quantise

_WARMUP = 3
_PAD = 0


def glm_peft_rate(
    batches: Sequence[Sequence[int]],
    device: torch.device,
    dtype: torch.dtype,
    *,
    small: bool,
    bits: int | None = None,
) -> float:
    """Real tokens a second of training steps.

    Args:
        batches: the lengths of the rows of each step, which are padded to the longest; all of their
            tokens are supervised.
        device: to run on.
        dtype: of the base; the adapter is float32.
        small: a tiny model instead of one with six billion parameters.
        bits: 8 or 4 for a base that bitsandbytes has quantised.
    """
    from transformers import GlmConfig, GlmForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
             "vocab_size": 1024} if small else {
             "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 28,
             "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
             "vocab_size": 65024}  # fmt: skip
    config = GlmConfig(**sizes, attention_bias=True, pad_token_id=_PAD, eos_token_id=2)
    with torch.device(device):
        base = GlmForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
    if bits:
        quantise(base, base.model.layers, bits)
    targets = ["q_proj", "k_proj", "v_proj"]
    model = get_peft_model(
        base, LoraConfig(r=8, lora_alpha=32, lora_dropout=0.1, target_modules=targets)
    )
    if device.type == "cuda" and not bits:
        for layer in base.model.layers:
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
