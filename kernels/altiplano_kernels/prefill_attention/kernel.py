"""FlashAttention-type tiling (Dao, 2023) over paged keys and values, for chunks of many sequences in one launch.

On Hopper this is the kernel of `groups`; elsewhere Triton's below, a program of which owns one head and one tile of queries of one chunk. The
caller lists the tiles: chunks start anywhere in their sequences, and keys of earlier chunks or of a cached prefix are read from the pages like
the chunk's own.
"""

import torch
import triton
import triton.language as tl

from altiplano_kernels.hopper import runs_on
from altiplano_kernels.prefill_attention import groups

QUERY_TILE = groups.ROWS


@triton.jit
def _tile_step(
    q, best, total, acc, cache, scales, table, start, end, rows_at, head, softmax_scale,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, SCALED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running softmax."""
    n, d = tl.arange(0, TILE), tl.arange(0, DIM)
    at = start + n
    page = tl.load(table + at // PAGE, mask=at < end, other=0).to(tl.int64)
    line = (page * 2 * KV_HEADS + head) * PAGE + at % PAGE
    inside = (at < end)[:, None]
    if MASKED:
        k = tl.load(cache + line[:, None] * DIM + d[None, :], mask=inside, other=0.0)
        v = tl.load(cache + (line[:, None] + KV_HEADS * PAGE) * DIM + d[None, :], mask=inside, other=0.0)
    else:
        k = tl.load(cache + line[:, None] * DIM + d[None, :])
        v = tl.load(cache + (line[:, None] + KV_HEADS * PAGE) * DIM + d[None, :])
    score = tl.dot(q, tl.trans(k.to(q.dtype))) * softmax_scale
    if SCALED:
        score *= tl.load(scales + line, mask=at < end, other=0.0).to(tl.float32)[None, :]
    if MASKED:
        score = tl.where(at[None, :] <= rows_at[:, None], score, -1e30)
    peak = tl.maximum(best, tl.max(score, 1))
    shrink = tl.exp2(best - peak)
    weight = tl.exp2(score - peak[:, None])
    total = total * shrink + tl.sum(weight, 1)
    if SCALED:
        weight *= tl.load(scales + line + KV_HEADS * PAGE, mask=at < end, other=0.0).to(tl.float32)[None, :]
    acc = tl.dot(weight.to(q.dtype), v.to(q.dtype), acc * shrink[:, None])
    return peak, total, acc


@triton.jit
def _prefill_kernel(
    query, out, cache, scales, tables, tiles,
    stride_query, stride_out, stride_table, softmax_scale,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    SCALED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    head, tile = tl.program_id(0), tl.program_id(1)
    first = tl.load(tiles + tile * 4).to(tl.int64)
    count = tl.load(tiles + tile * 4 + 1)
    position = tl.load(tiles + tile * 4 + 2)
    slot = tl.load(tiles + tile * 4 + 3).to(tl.int64)
    m, d = tl.arange(0, ROWS), tl.arange(0, DIM)
    real = (m < count)[:, None]
    rows_at = position + m
    q = tl.load(query + (first + m[:, None]) * stride_query + head * DIM + d[None, :], mask=real, other=0.0)
    best = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    table = tables + slot * stride_table
    kv_head = head // GROUP
    end = position + count
    # Every query of the tile sees all keys before the tile's first position: those tiles need no mask.
    free = ((position + 1) // TILE) * TILE
    for start in tl.range(0, free, TILE, num_stages=STAGES):
        best, total, acc = _tile_step(
            q, best, total, acc, cache, scales, table, start, end, rows_at, kv_head, softmax_scale,
            KV_HEADS, DIM, PAGE, TILE, SCALED, False,
        )  # fmt: skip
    for start in tl.range(free, end, TILE, num_stages=STAGES):
        best, total, acc = _tile_step(
            q, best, total, acc, cache, scales, table, start, end, rows_at, kv_head, softmax_scale,
            KV_HEADS, DIM, PAGE, TILE, SCALED, True,
        )  # fmt: skip
    target = out + (first + m[:, None]) * stride_out + head * DIM + d[None, :]
    tl.store(target, (acc / total[:, None]).to(out.dtype.element_ty), mask=real)


def list_tiles(chunks: list[tuple[int, int, int, int]], rows: int = QUERY_TILE) -> list[int]:
    """Flat [tiles * 4] of (first row, rows, position, slot) for chunks of (first row, tokens, start position, slot).

    The tiles with the most keys come first, so that the short ones fill the end of the launch.
    """
    tiles = [
        (first + at, min(rows, tokens - at), start + at, slot)
        for first, tokens, start, slot in chunks
        for at in range(0, tokens, rows)
    ]
    tiles.sort(key=lambda tile: -tile[2])
    return [number for tile in tiles for number in tile]


def prefill(
    query: torch.Tensor,
    cache: torch.Tensor,
    scales: torch.Tensor | None,
    tables: torch.Tensor,
    tiles: torch.Tensor,
    out: torch.Tensor,
    heads: int,
) -> torch.Tensor:
    """Causal attention of chunk tokens; their own keys and values must be in the pages already.

    query: bf16 [tokens, ≥ heads * head_dim]; cache, scales, tables: as in decode; tiles: int32 [tiles, 4] of `list_tiles`;
    out: bf16 [tokens, heads * head_dim], returned. The CUDA C++ kernel of `groups` where it can run, else Triton's.
    """
    _, _, kv_heads, page, dim = cache.shape
    if runs_on(query.device) and groups.fits(heads, kv_heads, dim, page):
        return groups.prefill_groups(query, cache, scales, tables, tiles, out, heads)
    return prefill_triton(query, cache, scales, tables, tiles, out, heads)


def prefill_triton(
    query: torch.Tensor,
    cache: torch.Tensor,
    scales: torch.Tensor | None,
    tables: torch.Tensor,
    tiles: torch.Tensor,
    out: torch.Tensor,
    heads: int,
    rows: int = QUERY_TILE,
    tile: int = 64,
    stages: int = 3,
    warps: int = 4,
) -> torch.Tensor:
    """The same on any GPU. rows: of a tile, as given to `list_tiles`; tile: of keys."""
    _, _, kv_heads, page, dim = cache.shape
    _prefill_kernel[(heads, tiles.numel() // 4)](
        query, out, cache, cache if scales is None else scales, tables, tiles,
        query.stride(0), out.stride(0), tables.stride(0), dim**-0.5 * 1.4426950408889634,
        GROUP=heads // kv_heads, KV_HEADS=kv_heads, DIM=dim, PAGE=page, ROWS=rows, TILE=tile,
        SCALED=scales is not None, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return out
