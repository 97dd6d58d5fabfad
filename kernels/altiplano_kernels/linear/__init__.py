"""Products of a few rows with a big weight, where cuBLAS leaves bandwidth unused: split along K, or with SwiGLU in the epilogue."""
