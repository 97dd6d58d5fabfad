"""The same in torch, in float64. Weights of 8 or 4 bits are those that `quantized.dequantize` gives; what `begin` gathers is exact."""

import torch

from altiplano_kernels.rms_norm.reference import rms_norm
from altiplano_kernels.rope.reference import rotate
from altiplano_kernels.swiglu.reference import swiglu


def linear(x: torch.Tensor, w: torch.Tensor, gamma: torch.Tensor | None = None, eps: float = 0.0) -> torch.Tensor:
    """x @ w.T, of rms_norm(x) * gamma where gamma is given; `add_linear` adds it to the residual, and `norm_draw` draws from it."""
    wide = x.double()
    return (wide if gamma is None else rms_norm(wide, gamma.double(), eps)) @ w.double().T


def norm_swiglu(x: torch.Tensor, gate_up: torch.Tensor, gamma: torch.Tensor, eps: float) -> torch.Tensor:
    """[rows, n] of gate_up: [2 n, k], gate first."""
    return swiglu(linear(x, gate_up, gamma, eps))


def norm_qkv(
    x: torch.Tensor, w: torch.Tensor, gamma: torch.Tensor, eps: float, cos_sin: torch.Tensor, heads: int, kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotated queries and keys, and values: [rows, heads or kv_heads, head_dim]. cos_sin: [rows, head_dim], of each row's position."""
    cos, sin = cos_sin.double().chunk(2, -1)
    vectors = linear(x, w, gamma, eps).view(len(x), heads + 2 * kv_heads, -1)
    query, key, value = vectors[:, :heads], vectors[:, heads : heads + kv_heads], vectors[:, heads + kv_heads :]
    return rotate(query, cos, sin), rotate(key, cos, sin), value
