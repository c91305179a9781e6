"""What a run will need, before it starts: memory by terms, a layout that fits the card, advice."""
