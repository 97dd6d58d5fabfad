"""Products whose sums do not depend on the number of rows, for batch-invariant inference. Held against `tile_linear.reference`."""
