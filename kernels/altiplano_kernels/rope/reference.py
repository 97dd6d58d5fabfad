"""Rotary embedding in torch, in the half-split layout of Hugging Face's Llama, with Llama 3's frequency scaling."""

import math
from collections.abc import Mapping
from typing import Any

import torch


def inverse_frequencies(head_dim: int, theta: float, scaling: Mapping[str, Any] | None) -> torch.Tensor:
    """float32 [head_dim / 2]. `scaling` is None or the `llama3` parameters of a config.json.

    Llama 3.1 and later stretch low frequencies by `factor`, keep high ones, and blend between.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if scaling is None:
        return frequencies
    original = scaling["original_max_position_embeddings"]
    low, high = original / scaling["low_freq_factor"], original / scaling["high_freq_factor"]
    wavelength = 2 * math.pi / frequencies
    blend = (original / wavelength - scaling["low_freq_factor"]) / (scaling["high_freq_factor"] - scaling["low_freq_factor"])
    stretched = frequencies / scaling["factor"]
    mixed = (1 - blend) * stretched + blend * frequencies
    return torch.where(wavelength > low, stretched, torch.where(wavelength < high, frequencies, mixed))


def cos_sin(positions: torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two float32 tables [tokens, head_dim / 2] for `positions`: int [tokens]."""
    angles = positions.float()[:, None] * frequencies[None, :]
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x: [tokens, heads, head_dim] by the tables of `cos_sin`."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None, :].to(x.dtype), sin[:, None, :].to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
