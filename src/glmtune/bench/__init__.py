"""How fast this machine does what the project does, each figure beside its ceiling."""
