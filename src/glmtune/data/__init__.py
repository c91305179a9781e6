"""From a file of instructions to token rows: read, validate, apply a template, encode."""
