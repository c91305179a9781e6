"""What transformers and PEFT offer of themselves: `GlmForCausalLM` of ChatGLM3-6B's size with LoRA.

Packed rows without document masks and compiled layer by layer, which is the fastest that they do on
ordinary settings; rows see their neighbours.
"""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from glmtune.bench.timing import times_ms


def time_glm_peft(
    num_tokens: int, device: torch.device, dtype: torch.dtype, *, steps: int, small: bool
) -> list[float]:
    """Milliseconds of each training step on one row of so many tokens.

    Args:
        num_tokens: tokens of the row, all of them learned.
        device: where.
        dtype: of the base; the adapter is float32.
        steps: how many are timed.
        small: a tiny model instead of one of six billion parameters.
    """
    from transformers import GlmConfig, GlmForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
             "vocab_size": 1024} if small else {
             "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 28,
             "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
             "vocab_size": 65024}  # fmt: skip
    config = GlmConfig(**sizes, attention_bias=True, pad_token_id=0, eos_token_id=2)
    with torch.device(device):
        base = GlmForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
    targets = ["q_proj", "k_proj", "v_proj"]
    model = get_peft_model(
        base, LoraConfig(r=8, lora_alpha=32, lora_dropout=0.1, target_modules=targets)
    )
    if device.type == "cuda":
        for layer in base.model.layers:
            layer.compile()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=device.type == "cuda")
    ids = torch.randint(5, config.vocab_size, (1, num_tokens), device=device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return times_ms(step, device, warmup=3, repeats=steps)
