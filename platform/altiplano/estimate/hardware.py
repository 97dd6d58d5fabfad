"""What the machine can do: named GPUs from measurement, anything else by a short measurement now."""

import time
from dataclasses import dataclass, replace

import psutil
import torch


@dataclass(frozen=True)
class Hardware:
    """One worker's device. `useful_share`: the part of `flops` that a training step turns into useful work."""

    name: str
    flops: float  # FLOP/s of a large matrix product
    memory_bytes: int
    useful_share: float


# Matrix product of 8192 cubed in bf16, and the share of it that stock TRL with LoRA reached on the same card at 16 384 tokens a
# step without gradient checkpointing (44.6 k tokens/s for Llama 3.2 1B at 5.41 GFLOP per token: 0.32; 3B: 0.33).
H200 = Hardware("NVIDIA H200", flops=747e12, memory_bytes=143_771 << 20, useful_share=0.32)

# LoRA at a few hundred tokens per step is bound by small products and Python on a CPU; measured with the demo on 2 cores.
CPU_USEFUL_SHARE = 0.25


def detect(use_gpu: bool) -> Hardware:
    """The device that a worker would get on this machine; without a GPU here, the one that we have measured, named so."""
    if not use_gpu:
        return Hardware("CPU, one core", _measure("cpu", torch.float32, 512), psutil.virtual_memory().total, CPU_USEFUL_SHARE)
    if not torch.cuda.is_available():
        return replace(H200, name=f"{H200.name} (assumed: there is no GPU here)")
    name = torch.cuda.get_device_name()
    if name == H200.name:
        return H200
    memory_bytes = torch.cuda.get_device_properties(0).total_memory
    return Hardware(name, _measure("cuda", torch.bfloat16, 8192), memory_bytes, H200.useful_share)


def _measure(device: str, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a square matrix product of random numbers, best of five; on one thread on a CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a = torch.randn(size, size, device=device).to(dtype)
        best = float("inf")
        for _ in range(6):
            start = time.perf_counter()
            b = a @ a
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        del b
        return 2 * size**3 / best
    finally:
        torch.set_num_threads(threads)
