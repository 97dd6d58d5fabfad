"""One module per family of kernels: what to launch at the shapes of Llama 3.2, and the bytes and operations that it cannot do without.

`case` says what a measurement is, `timing` measures it on a GPU. May import torch and altiplano_kernels; knows nothing of the engine.
"""
