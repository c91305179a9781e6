"""Plain functions of tensors and numbers: the attention mask rule, the loss, packed integers."""

CHUNK = 1024
"""Supervised tokens whose logits `loss` has at a time."""
