"""Plain functions of tensors and numbers: the attention mask rule and the loss."""
