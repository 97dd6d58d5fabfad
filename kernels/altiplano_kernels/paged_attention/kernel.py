"""Decode attention over pages: one query token per sequence, keys and values read once for a whole group of heads.

A program owns one (sequence, KV head, split). The group's queries are padded to 16 rows so that both products run on the tensor
cores. With more than one split the last program to finish adds the parts up (Flash-Decoding, Dao et al., 2023), so no second
kernel is launched. Lengths live on the GPU: a captured graph serves any of them.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

GROUP_ROWS = 16  # the smallest M of a tensor-core product


@triton.jit
def _decode_kernel(
    query, out, cache, scales, tables, slots, positions, parts, stats, counters,
    stride_query, stride_out, stride_table, softmax_scale,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr,
    SCALED: tl.constexpr, STAGES: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    length = tl.load(positions + row) + 1
    slot = tl.load(slots + row).to(tl.int64)
    member, d, n = tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, TILE)
    real = (member < GROUP)[:, None]
    q = tl.load(
        query + row.to(tl.int64) * stride_query + (head * GROUP + member[:, None]) * DIM + d[None, :], mask=real, other=0.0
    )
    if cache.dtype.element_ty == tl.float8e4nv:
        # The card converts e4m3 to float16 in one instruction, to bf16 in several; codes fit float16 without loss.
        q = q.to(tl.float16)
    per_split = tl.cdiv(tl.cdiv(length, TILE), SPLITS) * TILE
    begin = split * per_split
    end = tl.minimum(begin + per_split, length)
    best = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    table = tables + slot * stride_table
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        at = start + n
        inside = at < end
        page = tl.load(table + at // PAGE, mask=inside, other=0).to(tl.int64)
        line = (page * 2 * KV_HEADS + head) * PAGE + at % PAGE
        k = tl.load(cache + line[:, None] * DIM + d[None, :], mask=inside[:, None], other=0.0)
        v = tl.load(cache + (line[:, None] + KV_HEADS * PAGE) * DIM + d[None, :], mask=inside[:, None], other=0.0)
        score = tl.dot(q, tl.trans(k.to(q.dtype))) * softmax_scale
        if SCALED:
            score *= tl.load(scales + line, mask=inside, other=0.0).to(tl.float32)[None, :]
        score = tl.where(inside[None, :], score, -1e30)
        peak = tl.maximum(best, tl.max(score, 1))
        shrink = tl.exp2(best - peak)
        weight = tl.exp2(score - peak[:, None])
        total = total * shrink + tl.sum(weight, 1)
        if SCALED:
            weight *= tl.load(scales + line + KV_HEADS * PAGE, mask=inside, other=0.0).to(tl.float32)[None, :]
        acc = tl.dot(weight.to(q.dtype), v.to(q.dtype), acc * shrink[:, None])
        best = peak
    target = out + row.to(tl.int64) * stride_out + (head * GROUP + member[:, None]) * DIM + d[None, :]
    if SPLITS == 1:
        tl.store(target, (acc / total[:, None]).to(out.dtype.element_ty), mask=real)
    else:
        group = row * KV_HEADS + head
        place = (group.to(tl.int64) * SPLITS + split) * ROWS + member
        tl.store(parts + place[:, None] * DIM + d[None, :], acc)
        tl.store(stats + place * 2, best)
        tl.store(stats + place * 2 + 1, total)
        # All stores of this program before the count (barrier), the count before the reads of others (acquire).
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + group, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLITS - 1:
            best = tl.full((ROWS,), -1e30, tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            acc = tl.zeros((ROWS, DIM), tl.float32)
            for other in range(SPLITS):
                place = (group.to(tl.int64) * SPLITS + other) * ROWS + member
                peak_other = tl.load(stats + place * 2, cache_modifier=".cg")
                peak = tl.maximum(best, peak_other)
                mine, theirs = tl.exp2(best - peak), tl.exp2(peak_other - peak)
                total = total * mine + tl.load(stats + place * 2 + 1, cache_modifier=".cg") * theirs
                acc = (
                    acc * mine[:, None]
                    + tl.load(parts + place[:, None] * DIM + d[None, :], cache_modifier=".cg") * theirs[:, None]
                )
                best = peak
            tl.store(target, (acc / total[:, None]).to(out.dtype.element_ty), mask=real)
            tl.store(counters + group, 0)


class DecodeWorkspace:
    """Parts, maxima, sums and arrival counts for up to `batch` sequences. Shared by all layers of a stream, because they run in turn."""

    def __init__(self, batch: int, kv_heads: int, head_dim: int, device: str, splits: int) -> None:
        self.parts = torch.empty(batch * kv_heads * splits * GROUP_ROWS * head_dim, dtype=torch.float32, device=device)
        self.stats = torch.empty(batch * kv_heads * splits * GROUP_ROWS * 2, dtype=torch.float32, device=device)
        self.counters = torch.zeros(batch * kv_heads, dtype=torch.int32, device=device)


def choose_splits(batch: int, kv_heads: int, head_dim: int, processors: int = 132) -> int:
    """Splits per (sequence, head): none from 24 KiB of keys in flight a processor on, else about four programs a processor, at most 32."""
    if batch * kv_heads * head_dim >= 192 * processors:
        return 1
    wanted = -(-4 * processors // (batch * kv_heads))
    return int(min(32, triton.next_power_of_2(wanted)))


def choose_tiling(batch: int, kv_heads: int, head_dim: int, processors: int = 132) -> tuple[int, int, int]:
    """Tile, stages and warps, measured on an H200 at 32 to 512 sequences of both models. One warp a program is enough where so many wait that long
    sequences end among others; two end long ones sooner."""
    crowded = batch * kv_heads * head_dim >= 1024 * processors
    split = head_dim == 64 and choose_splits(batch, kv_heads, head_dim, processors) > 1
    return (32, 4, 1) if crowded or split else (64, 3, 2)


def decode(
    query: torch.Tensor,
    cache: torch.Tensor,
    scales: torch.Tensor | None,
    tables: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor,
    workspace: DecodeWorkspace,
    heads: int,
    splits: int,
    tile: int = 32,
    stages: int = 4,
    warps: int = 1,
    pdl: bool = False,
) -> torch.Tensor:
    """Attention of one token per row over cached positions 0 … position, its own included.

    query: bf16 [batch, ≥ heads * head_dim] (rows may be wider, as in a qkv buffer); cache: [blocks, 2, kv_heads, page, head_dim];
    scales: float16 [blocks, 2, kv_heads, page] for 8-bit caches; tables: int32 [slots, pages]; slots, positions: int32 [batch];
    out: bf16 [batch, heads * head_dim], returned.
    """
    _, _, kv_heads, page, dim = cache.shape
    extra = {"launch_pdl": True} if pdl else {}
    # The GPU starts programs in this order, rows last: those of long rows, which a step puts first, must not come at the end.
    _decode_kernel[(splits, kv_heads, query.shape[0])](
        query, out, cache, cache if scales is None else scales, tables, slots, positions,
        workspace.parts, workspace.stats, workspace.counters,
        query.stride(0), out.stride(0), tables.stride(0), dim**-0.5 * 1.4426950408889634,
        GROUP=heads // kv_heads, KV_HEADS=kv_heads, DIM=dim, PAGE=page, SPLITS=splits, TILE=tile,
        SCALED=scales is not None, STAGES=stages, ROWS=GROUP_ROWS, PDL=pdl, num_warps=warps, **extra,
    )  # fmt: skip
    return out
