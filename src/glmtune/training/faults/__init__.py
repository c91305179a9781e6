"""What can go wrong in a run: an exploding loss, numbers that are not finite; a step for replay."""
