"""Decode attention of 1 to 16 rows over pages: one cluster of blocks per row and KV head."""
