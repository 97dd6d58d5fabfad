"""Paged attention in torch: one query token per sequence (decode), or a chunk of one sequence (prefill)."""

import torch
import torch.nn.functional as F


def write_kv(cache: torch.Tensor, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Store tokens in place. cache: [blocks, 2, kv_heads, block_size, head_dim]; slots: int64 [tokens], block * block_size + offset;
    key, value: [tokens, kv_heads, head_dim]."""
    size = cache.shape[3]
    block, offset = slots // size, slots % size
    cache[block, 0, :, offset] = key
    cache[block, 1, :, offset] = value


def decode(query: torch.Tensor, cache: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """One token per sequence against its first `lengths` cached tokens, its own included.

    query: [batch, heads, head_dim]; tables: int64 [batch, blocks]; lengths: int64 [batch]. Returns [batch, heads, head_dim].
    """
    batch, heads, dim = query.shape
    keys, values = _gather(cache, tables)
    mask = torch.arange(keys.shape[2], device=query.device)[None, :] < lengths[:, None]
    # What lies behind may be anything, and zero times NaN is NaN.
    row, position = (~mask).nonzero(as_tuple=True)
    for gathered in (keys, values):
        gathered[row, :, position] = 0
    out = F.scaled_dot_product_attention(query[:, :, None, :], keys, values, attn_mask=mask[:, None, None, :], enable_gqa=True)
    return out.view(batch, heads, dim)


def prefill(query: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, start: int) -> torch.Tensor:
    """A chunk of one sequence at positions start … start + n - 1, causal over everything cached before and in it.

    query: [n, heads, head_dim]; table: int64 [blocks]. Returns [n, heads, head_dim].
    """
    n = query.shape[0]
    keys, values = _gather(cache, table[None])
    keys, values = keys[:, :, : start + n], values[:, :, : start + n]
    visible = (
        torch.arange(start + n, device=query.device)[None, :] <= torch.arange(start, start + n, device=query.device)[:, None]
    )
    out = F.scaled_dot_product_attention(query.transpose(0, 1)[None], keys, values, attn_mask=visible, enable_gqa=True)
    return out[0].transpose(0, 1)


def _gather(cache: torch.Tensor, tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as [batch, kv_heads, blocks * block_size, head_dim]."""
    pages = cache[tables].permute(2, 0, 3, 1, 4, 5)  # k|v, batch, kv_heads, blocks, block_size, head_dim
    keys, values = pages.flatten(3, 4).unbind(0)
    return keys, values
