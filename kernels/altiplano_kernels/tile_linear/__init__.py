"""Products of tens to hundreds of rows: weights through the tensor copy engine, wgmma, the next kernel's norm or SwiGLU fused."""
