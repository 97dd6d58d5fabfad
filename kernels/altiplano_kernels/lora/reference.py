"""Multi-LoRA in torch: each row of a batch has its own adapter, or none."""

import torch


def add_lora(
    out: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, gain: torch.Tensor | None, rows: torch.Tensor | None
) -> None:
    """out[rows] = out[rows] * gain + x[rows] @ down.T @ up.T in place, with the scale already in `up`; no `gain` is a gain of 1.

    out: [tokens, out_features] (may be a slice of a wider tensor); x: [tokens, in_features]; down: [r, in_features];
    up: [out_features, r]; gain: [out_features]; rows: int64 indices, or None for all rows.
    """
    if gain is not None and rows is None:
        out *= gain
    elif gain is not None:
        out[rows] *= gain
    if rows is None:
        out += (x @ down.T) @ up.T
    else:
        out[rows] += (x[rows] @ down.T) @ up.T
