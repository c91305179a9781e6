"""What this machine reaches, measured on random weights."""
