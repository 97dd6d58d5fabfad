"""The backend for NVIDIA GPUs: Triton kernels and CUDA graphs, with the state of every request on the GPU."""
