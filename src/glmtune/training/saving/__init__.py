"""A run folder on disk: checkpoints that are whole, the room they need, and how a run resumes."""
