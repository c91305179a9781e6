"""Plain functions of tensors and numbers: the attention mask rule, the loss, packed integers."""
