"""`glmtune doctor`: a look at everything before a run, and known errors explained."""
