"""Rotary embedding of queries and keys, and the write of keys and values into pages, quantizing where the cache is 8-bit."""
