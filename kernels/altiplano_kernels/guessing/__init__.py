"""Speculative decoding without the host: guesses from a request's own text, rows to check them, and what was right."""
