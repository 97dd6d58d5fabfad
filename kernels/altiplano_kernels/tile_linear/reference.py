"""The same in torch, in float64."""

import torch

from altiplano_kernels.sampling.reference import gumbel
from altiplano_kernels.swiglu.reference import swiglu


def linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """float64 [rows, n] of x: [rows, k] and w: [n, k]."""
    return x.double() @ w.double().T


def swiglu_linear(x: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """float64 [rows, n] of x: [rows, k] and gate_up: [2 n, k], gate first."""
    return swiglu(linear(x, gate_up))


def scores(
    x: torch.Tensor, w: torch.Tensor, temperatures: torch.Tensor, seeds: torch.Tensor, steps: torch.Tensor
) -> torch.Tensor:
    """float64 [rows, n]: what the token that is drawn has the most of. Logits of rows whose temperature is below 1e-5; of the others logits
    over temperature, with noise. temperatures: float32; seeds, steps: int64; all [rows]."""
    logits, hot = linear(x, w), temperatures[:, None] >= 1e-5
    tempered = logits / temperatures.double()[:, None].clamp(min=1e-5) + gumbel(seeds, steps, len(w)).double()
    return torch.where(hot, tempered, logits)
