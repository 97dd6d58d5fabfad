"""Attention over pages whose result for a token does not depend, to the bit, on the tokens that are computed beside it.

Keys are taken in parts of a fixed size, from the first one on; a part is summed tile by tile, and the parts are added up in their order. So it
does not matter whether one program takes all parts (chunks of prompts, and steps of many rows) or several programs share them (steps of few
rows, as Flash-Decoding does): the same numbers are added in the same order. What a row must not see weighs nothing, to the bit.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from altiplano_kernels.hopper import runs_on
from altiplano_kernels.prefill_attention.kernel import QUERY_TILE

ROWS, TILE, STAGES, WARPS = 64, 64, 3, 4  # queries of a program, keys of a tile
FEW_ROWS, FEW_WARPS = 16, 2  # the same for the heads of one group, where the smaller instructions give the same bits
PART = 256  # keys; what is computed depends on it
FEW = 264  # programs that keep an H200 busy


@triton.jit
def _add_part(best, total, acc, part_best, part_total, part_acc):
    """Two softmaxes made one. The multiply-adds are written out, so that they are the same ones in every kernel."""
    top = tl.maximum(best, part_best)
    mine, theirs = tl.exp2(best - top), tl.exp2(part_best - top)
    total = tl.fma(total, mine, part_total * theirs)
    return top, total, tl.fma(acc, mine[:, None], part_acc * theirs[:, None])


@triton.jit
def _part(
    q, cache, scales, table, start, end, rows_at, head, softmax_scale,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr,
    SCALED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Largest score, sum of weights and weighted sum of values over the keys from `start` on: PART of them, or those below `end`."""
    n, d = tl.arange(0, TILE), tl.arange(0, DIM)
    best = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    for first in tl.range(start, tl.minimum(start + PART, end), TILE, num_stages=STAGES):
        at = first + n
        page = tl.load(table + at // PAGE, mask=at < end, other=0).to(tl.int64)
        line = (page * 2 * KV_HEADS + head) * PAGE + at % PAGE
        inside = (at < end)[:, None]
        k = tl.load(cache + line[:, None] * DIM + d[None, :], mask=inside, other=0.0)
        v = tl.load(cache + (line[:, None] + KV_HEADS * PAGE) * DIM + d[None, :], mask=inside, other=0.0)
        score = tl.dot(q, tl.trans(k.to(q.dtype))) * softmax_scale
        if SCALED:
            score *= tl.load(scales + line, mask=at < end, other=0.0).to(tl.float32)[None, :]
        score = tl.where(at[None, :] <= rows_at[:, None], score, -1e30)
        peak = tl.maximum(best, tl.max(score, 1))
        shrink = tl.exp2(best - peak)
        weight = tl.exp2(score - peak[:, None])
        total = tl.fma(total, shrink, tl.sum(weight, 1))
        if SCALED:
            weight *= tl.load(scales + line + KV_HEADS * PAGE, mask=at < end, other=0.0).to(tl.float32)[None, :]
        acc = tl.dot(weight.to(q.dtype), v.to(q.dtype), acc * shrink[:, None])
        best = peak
    return best, total, acc


# Whatever a table's width is must not be compiled apart.
@triton.jit(do_not_specialize=["stride_table", "most_parts"])
def _steady_attention_kernel(
    query, out, cache, scales, tables, tiles, slots, positions, parts, stats, counters,
    stride_query, stride_out, stride_table, most_parts, softmax_scale,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, PART: tl.constexpr, SHARED: tl.constexpr, SUBTILES: tl.constexpr, CHUNKS: tl.constexpr, SCALED: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program has up to ROWS queries: tokens of one chunk, or one row, each with HEADS of the heads of a group."""
    program, tile = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    SHARES: tl.constexpr = GROUP // HEADS
    TOKENS: tl.constexpr = ROWS // HEADS
    kv_head, sub = program // (SHARES * SUBTILES), program % (SHARES * SUBTILES)
    if CHUNKS:
        first = tl.load(tiles + tile * 4).to(tl.int64)
        count = tl.load(tiles + tile * 4 + 1)
        position = tl.load(tiles + tile * 4 + 2)
        slot = tl.load(tiles + tile * 4 + 3).to(tl.int64)
    else:
        first, count = tile.to(tl.int64), 1
        position = tl.load(positions + tile)
        slot = tl.load(slots + tile).to(tl.int64)
    m, d = tl.arange(0, ROWS), tl.arange(0, DIM)
    token = sub // SHARES * TOKENS + m // HEADS
    head = kv_head * GROUP + sub % SHARES * HEADS + m % HEADS
    real = ((token < count) & (m < TOKENS * HEADS))[:, None]
    rows_at = position + token
    q = tl.load(query + (first + token[:, None]) * stride_query + head[:, None] * DIM + d[None, :], mask=real, other=0.0)
    table = tables + slot * stride_table
    end = position + tl.minimum(count, (sub // SHARES + 1) * TOKENS)
    target = out + (first + token[:, None]) * stride_out + head[:, None] * DIM + d[None, :]
    best = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    if SHARED:
        worker, workers = tl.program_id(2), tl.num_programs(2)
        group = tile * KV_HEADS + kv_head
        base = group.to(tl.int64) * most_parts
        kept = m < GROUP
        for part in tl.range(worker, tl.cdiv(end, PART), workers, num_stages=1):
            best, total, acc = _part(
                q, cache, scales, table, part * PART, end, rows_at, kv_head, softmax_scale,
                KV_HEADS, DIM, PAGE, ROWS, TILE, PART, SCALED, STAGES,
            )  # fmt: skip
            place = (base + part) * GROUP + m
            tl.store(parts + place[:, None] * DIM + d[None, :], acc, mask=kept[:, None])
            tl.store(stats + place * 2, best, mask=kept)
            tl.store(stats + place * 2 + 1, total, mask=kept)
        # All stores of this program before the count (barrier), the count before the reads of others (acquire).
        tl.debug_barrier()
        busy = tl.minimum(tl.cdiv(end, PART), workers)
        arrived = 0
        if worker < busy:
            arrived = tl.atomic_add(counters + group, 1, sem="acq_rel", scope="gpu") + 1
        if arrived == busy:
            best = tl.full((ROWS,), -1e30, tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            acc = tl.zeros((ROWS, DIM), tl.float32)
            for part in range(tl.cdiv(end, PART)):
                place = (base + part) * GROUP + m
                part_best = tl.load(stats + place * 2, mask=kept, other=0.0, cache_modifier=".cg")
                part_total = tl.load(stats + place * 2 + 1, mask=kept, other=1.0, cache_modifier=".cg")
                part_acc = tl.load(parts + place[:, None] * DIM + d[None, :], mask=kept[:, None], other=0.0, cache_modifier=".cg")
                best, total, acc = _add_part(best, total, acc, part_best, part_total, part_acc)
            tl.store(target, (acc / total[:, None]).to(out.dtype.element_ty), mask=real)
            tl.store(counters + group, 0)
    else:
        for start in tl.range(0, end, PART, num_stages=1):
            part_best, part_total, part_acc = _part(
                q, cache, scales, table, start, end, rows_at, kv_head, softmax_scale,
                KV_HEADS, DIM, PAGE, ROWS, TILE, PART, SCALED, STAGES,
            )  # fmt: skip
            best, total, acc = _add_part(best, total, acc, part_best, part_total, part_acc)
        tl.store(target, (acc / total[:, None]).to(out.dtype.element_ty), mask=real)


def places_of(group: int, longest: int) -> int:
    """Parts that a `Workspace` has room for."""
    return FEW // 2 * -(-longest // PART) * group


class Workspace:
    """Parts of rows whose programs share them. Used by all layers of a stream, because they run in turn."""

    def __init__(self, group: int, head_dim: int, longest: int, device: str) -> None:
        """`group`: heads of a KV head; `longest`: tokens of a sequence, at most."""
        self.most_parts = -(-longest // PART)
        places = places_of(group, longest)
        self.parts = torch.empty(places * head_dim, dtype=torch.float32, device=device)
        self.stats = torch.empty(places * 2, dtype=torch.float32, device=device)
        self.counters = torch.zeros(FEW // 2, dtype=torch.int32, device=device)

    def workers(self, groups: int) -> int:
        """Programs for each of so many (row, KV head): a power of 2."""
        if 2 * groups > FEW:
            return 1
        return 1 << (min(FEW // groups, self.most_parts).bit_length() - 1)


def choose_shape(group: int, cache: torch.Tensor, workers: int) -> tuple[int, int]:
    """Queries and warps of a program of a decode step, which must give the bits of ROWS and WARPS.

    On an H200 few queries do for bf16, and not for 8 bits; they are faster but for programs that share rows of 128 dimensions.
    """
    same = runs_on(cache.device) and cache.dtype is torch.bfloat16
    if same and group <= FEW_ROWS and (cache.shape[-1] <= 64 or workers == 1):
        return FEW_ROWS, FEW_WARPS
    return ROWS, WARPS


def chunks(
    query: torch.Tensor,
    cache: torch.Tensor,
    scales: torch.Tensor | None,
    tables: torch.Tensor,
    tiles: torch.Tensor,
    out: torch.Tensor,
    heads: int,
) -> torch.Tensor:
    """Causal attention of chunk tokens; all as for `prefill_attention.kernel.prefill`, whose tiles these are."""
    _, _, kv_heads, page, dim = cache.shape
    subtiles = -(-QUERY_TILE // ROWS)
    nothing = tiles
    _steady_attention_kernel[(heads * subtiles, tiles.numel() // 4, 1)](
        query, out, cache, cache if scales is None else scales, tables, tiles, nothing, nothing, nothing, nothing, nothing,
        query.stride(0), out.stride(0), tables.stride(0), 0, dim**-0.5 * 1.4426950408889634,
        GROUP=heads // kv_heads, KV_HEADS=kv_heads, DIM=dim, PAGE=page, HEADS=1, ROWS=ROWS, TILE=TILE, PART=PART, SHARED=False,
        SUBTILES=subtiles, CHUNKS=True, SCALED=scales is not None, STAGES=STAGES, PDL=False, num_warps=WARPS,
    )  # fmt: skip
    return out


def decode(
    query: torch.Tensor,
    cache: torch.Tensor,
    scales: torch.Tensor | None,
    tables: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor,
    workspace: Workspace,
    heads: int,
    pdl: bool = False,
) -> torch.Tensor:
    """Attention of one token per row over cached positions 0 … position, its own included; all as for `paged_attention.kernel.decode`."""
    _, _, kv_heads, page, dim = cache.shape
    rows, group = len(slots), heads // kv_heads
    extra = {"launch_pdl": True} if pdl else {}
    workers = workspace.workers(rows * kv_heads)
    queries, warps = choose_shape(group, cache, workers)
    _steady_attention_kernel[(kv_heads, rows, workers)](
        query, out, cache, cache if scales is None else scales, tables, slots, slots, positions,
        workspace.parts, workspace.stats, workspace.counters,
        query.stride(0), out.stride(0), tables.stride(0), workspace.most_parts, dim**-0.5 * 1.4426950408889634,
        GROUP=group, KV_HEADS=kv_heads, DIM=dim, PAGE=page, HEADS=group, ROWS=queries, TILE=TILE, PART=PART, SHARED=workers > 1,
        SUBTILES=1, CHUNKS=False, SCALED=scales is not None, STAGES=STAGES, PDL=pdl, num_warps=warps, **extra,
    )  # fmt: skip
    return out
