"""The kernels of a decode step of 1 to 16 rows: its start, and every product with what comes before and after it fused."""
