"""8-bit rows in torch."""

import torch

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize_rows(x: torch.Tensor, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scales) with x ≈ codes * scales[:, None], to the nearest (even among equals). x: [rows, k]; scales: float32 [rows].

    Rows of zeros, or too small for the inverse of their scale, have codes of zero.
    """
    wide = x.float()
    scales = wide.abs().amax(-1) / LARGEST[kind]
    units = wide * torch.where(scales > 1e-30, 1 / scales, 0.0)[:, None]
    # The inverse is rounded, so the largest may come out a little above its limit.
    units = units.clamp(-LARGEST[kind], LARGEST[kind])
    return (units.round() if kind is torch.int8 else units).to(kind), scales


def linear(codes: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor) -> torch.Tensor:
    """float64 [rows, n]: the product of what two `quantize_rows` stand for."""
    return (codes.double() @ weight.double().T) * scales.double()[:, None] * weight_scales.double()[None, :]
