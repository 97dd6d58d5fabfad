"""Attention over a KV cache in pages. One layer's cache is [blocks, 2 (k, v), kv_heads, block_size, head_dim]."""
