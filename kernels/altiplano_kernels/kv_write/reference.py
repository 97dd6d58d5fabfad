"""The same in torch, in the precision of the rows that are given: float64 for tests."""

import torch

from altiplano_kernels.rope.reference import rotate
from altiplano_kernels.w8a8.reference import LARGEST


def rope_and_write(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    tables: torch.Tensor,
    cos_sin: torch.Tensor,
    cache: torch.Tensor,
    scales: torch.Tensor | None,
    heads: int,
) -> None:
    """Arguments as for `kernel.rope_and_write`, but any float dtype for qkv, cos_sin and a cache without scales."""
    _, _, kv_heads, page, dim = cache.shape
    cos, sin = cos_sin[positions.long()].chunk(2, -1)
    query, key, value = qkv.view(len(qkv), -1, dim).split([heads, kv_heads, kv_heads], 1)
    query.copy_(rotate(query, cos, sin))
    block = tables[slots.long(), positions.long() // page].long()
    at = positions.long() % page
    for side, vectors in enumerate((rotate(key, cos, sin), value)):
        if scales is None:
            cache[block, side, :, at] = vectors.to(cache.dtype)
        else:
            codes, scale = quantize(vectors, cache.dtype)
            cache[block, side, :, at] = codes
            scales[block, side, :, at] = scale


def quantize(vectors: torch.Tensor, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of vectors [..., head_dim], and their scales: float16 [...], the largest magnitude over the largest code, and more than zero."""
    scale = (vectors.abs().amax(-1) / LARGEST[kind]).clamp(min=6e-8).half()
    units = vectors / scale.to(vectors.dtype)[..., None]
    return (units.round() if kind is torch.int8 else units).to(kind), scale
