"""The general set: what a base knows beside any task, and how a loaded model scores on it."""
