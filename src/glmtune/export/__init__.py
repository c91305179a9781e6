"""Write a tuned model for other programs, and open what was written again; see `run.export`."""
