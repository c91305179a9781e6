"""ChatGLM-6B as a native transformers model: configuration, model and tokenizer."""
