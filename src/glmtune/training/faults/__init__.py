"""A run that goes wrong: loss that explodes, numbers not finite, a step kept for replay."""
