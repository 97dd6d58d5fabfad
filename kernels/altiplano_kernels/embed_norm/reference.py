"""The same in torch, in the precision of what is given: float64 for tests."""

import torch

from altiplano_kernels.rms_norm.reference import add_rms_norm, rms_norm


def embed_rows(
    tokens: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, table: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(residual, normalised, positions) of the rows whose slots are in `slots`: [rows, hidden] twice, and int32 [rows]."""
    at = slots.long()
    residual = table[tokens[at].long()]
    return residual, rms_norm(residual, weight, eps), positions[at]


def add_norm_parts(
    parts: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normalised sum, sum) of the residual [rows, hidden] and of all parts [splits, rows, hidden]; `add_norm` is that of one part."""
    return add_rms_norm(parts.sum(0), residual, weight, eps)
