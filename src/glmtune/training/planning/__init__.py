"""What a run will take, before it starts: memory by terms, a layout that fits the card, advice."""
