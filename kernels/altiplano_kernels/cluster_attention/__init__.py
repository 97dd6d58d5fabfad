"""Decode attention over pages, bf16 or 8 bit: one cluster of blocks per row and KV head. Held against `paged_attention.reference`."""
