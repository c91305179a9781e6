"""Answers of base and tuned weights, and the pages that show them side by side."""
