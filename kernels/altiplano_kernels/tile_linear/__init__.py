"""Products of tens to hundreds of rows: weights through the tensor copy engine, wgmma; SwiGLU or the draw fused, or parts for the next norm."""
