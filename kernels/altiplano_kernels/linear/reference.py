"""The same in torch, in float64; also what `steady_linear` and `few_rows` multiply."""

import torch

from altiplano_kernels.swiglu.reference import swiglu


def linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """float64 [rows, n] of x: [rows, k] and w: [n, k]."""
    return x.double() @ w.double().T


def swiglu_linear(x: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """float64 [rows, n] of x: [rows, k] and gate_up: [2 n, k], gate first."""
    return swiglu(linear(x, gate_up))
