"""A run folder on disk: whole checkpoints, the space they need, and how a run resumes."""
