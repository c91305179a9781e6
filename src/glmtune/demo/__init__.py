"""The demonstration: a toy world in two languages, and a tiny model that knows it."""
