"""RMSNorm in torch (Zhang and Sennrich, 2019), with the residual add that always comes before it in a Llama block."""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x: [tokens, hidden]; weight: [hidden]. The mean of squares is taken in float32, as transformers does."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(normalised sum, sum) of x and residual, both [tokens, hidden]."""
    total = x + residual
    return rms_norm(total, weight, eps), total
