"""`glmtune doctor`: check everything before a run, and explain known errors."""
