"""Multi-LoRA in torch: each row of a batch has its own adapter, or none."""

import torch


def add_lora(out: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, rows: torch.Tensor | None) -> None:
    """out[rows] += x[rows] @ down.T @ up.T in place, with the scale already in `up`.

    out: [tokens, out_features] (may be a slice of a wider tensor); x: [tokens, in_features]; down: [r, in_features];
    up: [out_features, r]; rows: int64 indices, or None for all rows.
    """
    if rows is None:
        out += (x @ down.T) @ up.T
    else:
        out[rows] += (x[rows] @ down.T) @ up.T
