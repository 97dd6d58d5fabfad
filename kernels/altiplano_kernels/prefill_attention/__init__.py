"""Attention of prompt chunks over pages: causal, with whatever was cached before the chunk. Held against `paged_attention.reference`."""
