"""Start of a step (token to embedding, position, first norm) and the residual add with RMSNorm between blocks, for many rows."""
