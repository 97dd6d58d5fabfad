"""Draws under top-k, top-p and min-p without a sort. Held against `sampling.reference`."""
