"""Plain functions of tensors and numbers: the attention mask rule, the loss, packed integers."""

CHUNK = 1024
"""Supervised tokens whose logits the loss holds at a time: 0.25 GiB in bfloat16 for ChatGLM-6B."""
MOST_RANK = 64
"""The largest rank of an adapter that the kernels of compiled layers hold in registers."""
