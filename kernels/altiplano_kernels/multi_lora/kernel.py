"""out = gain * out + x · down · up with another adapter for every row, as two products over tiles of rows that share an adapter.

    x [rows, in] ──► shrink: parts [splits, tiles × rows of a tile, modules × rank] ──► expand: out [rows, out], in place

Modules that read the same x (q, k and v; gate and up) are one call: their `down` are stacked, and their outputs lie side by side.
The list of tiles is data, so a captured launch serves any mix of adapters: a tile without an adapter ends at once, and rows
without one are in no tile. The sums of a split K are added in a fixed order by the second kernel.

What a decode step pays is latency: eight rows of rank 8 move 1 to 3 MB a product, 1 µs at most. So lists, weights and gains, which no
kernel of the step writes, are asked for before the wait for the kernel before, a program of the first kernel has one load and one product, and
only the rows' own numbers come after it: two launches of 2 µs, where 7 to 16 were measured with four loads in a row, launches that did not
overlap, and masks by the rank that cut the loads of `up` into pieces of two bytes.

S-LoRA (Sheng et al. 2023, arXiv 2311.03285) and Punica (Chen et al. 2023, arXiv 2310.18547) group rows in the same way.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

HEADER = 3  # numbers of a tile before its rows: adapter (from 1; 0: none), rows, rank


class Shape(NamedTuple):
    """Rows of a tile; inputs whose sum is a part of its own; depth of a load."""

    rows: int
    span: int
    depth: int


DECODE = Shape(16, 512, 512)
PREFILL = Shape(64, 65536, 64)


def most_tiles(rows: int, adapters: int, shape: Shape) -> int:
    """Tiles that `rows` rows can need, whatever their adapters are."""
    return min(rows, rows // shape.rows + adapters)


def list_tiles(owners: Sequence[int], ranks: Sequence[int], shape: Shape, tiles: int = 0) -> list[int]:
    """HEADER + shape.rows numbers a tile, for the kernels; at least `tiles` tiles, the last ones without an adapter.

    owners[i]: the adapter of row i, from 1, or 0 for none; ranks[a - 1]: the rank of adapter a.
    """
    width, found = HEADER + shape.rows, list[int]()
    members: dict[int, list[int]] = {}
    for row, owner in enumerate(owners):
        if owner:
            members.setdefault(owner, []).append(row)
    for owner, rows in sorted(members.items()):
        for first in range(0, len(rows), shape.rows):
            part = rows[first : first + shape.rows]
            found += [owner, len(part), ranks[owner - 1], *part, *[0] * (shape.rows - len(part))]
    return found + [0] * (width * tiles - len(found))


@triton.jit
def _dot(a, b, INTERPRETED: tl.constexpr):
    """a @ b in float32. Triton's interpreter takes the bits of bf16 for integers, so it gets the same values as float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b)


@triton.jit
def _shrink_kernel(
    x, down, parts, tiles, stride_x, stride_part,
    K: tl.constexpr, WIDE: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, HEADER: tl.constexpr, COLUMNS: tl.constexpr,
    SPAN: tl.constexpr, DEPTH: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tile, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head = tiles + tile * (HEADER + ROWS)
    adapter, count, rank = tl.load(head), tl.load(head + 1), tl.load(head + 2)
    i, c, k = tl.arange(0, ROWS), block * COLUMNS + tl.arange(0, COLUMNS), part * SPAN + tl.arange(0, DEPTH)
    # Columns behind the adapter's own rank are never read.
    active = (adapter > 0) & (block * COLUMNS % RANK < rank)
    row = tl.load(head + HEADER + i, mask=active & (i < count), other=0).to(tl.int64)
    x_at = x + row[:, None] * stride_x + k[None, :]
    w_at = down + (adapter - 1).to(tl.int64) * WIDE * K + c[None, :] * K + k[:, None]
    first = tl.load(w_at, mask=active & (k < K)[:, None], other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if active:
        acc = _dot(tl.load(x_at, mask=(i < count)[:, None] & (k < K)[None, :], other=0.0), first, INTERPRETED)
        for start in range(DEPTH, SPAN if SPAN < K else K, DEPTH):
            inside = start + k < K
            values = tl.load(x_at + start, mask=(i < count)[:, None] & inside[None, :], other=0.0)
            acc += _dot(values, tl.load(w_at + start, mask=inside[:, None], other=0.0), INTERPRETED)
        tl.store(parts + part * stride_part + (tile * ROWS + i)[:, None] * WIDE + c[None, :], acc)


@triton.jit
def _expand_kernel(
    parts, up, gain, out, tiles, first_end, second_end, stride_part, stride_out,
    N: tl.constexpr, WIDE: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, HEADER: tl.constexpr, COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tile, block = tl.program_id(0), tl.program_id(1)
    head = tiles + tile * (HEADER + ROWS)
    adapter, count, rank = tl.load(head), tl.load(head + 1), tl.load(head + 2)
    i, n, r = tl.arange(0, ROWS), block * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, RANK)
    row = tl.load(head + HEADER + i, mask=i < count, other=0).to(tl.int64)
    line = (adapter - 1).to(tl.int64) * N + n
    # Loads are masked by eights, so that they stay whole; what is behind the rank in the last eight is dropped after them.
    near = (r // 8 * 8 < rank) & (adapter > 0)
    w = tl.load(up + line[None, :] * RANK + r[:, None], mask=near[:, None], other=0.0)
    w = tl.where((r < rank)[:, None], w, 0.0)
    strength = tl.load(gain + line, mask=adapter > 0, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if adapter > 0:
        module = (block * COLUMNS >= first_end).to(tl.int32) + (block * COLUMNS >= second_end).to(tl.int32)
        part_at = parts + (tile * ROWS + i)[:, None] * WIDE + module * RANK + r[None, :]
        out_at = out + row[:, None] * stride_out + n[None, :]
        before = tl.load(out_at, mask=(i < count)[:, None], other=0.0).to(tl.float32)
        low = tl.zeros((ROWS, RANK), tl.float32)
        for part in tl.static_range(SPLITS):
            low += tl.load(part_at + part * stride_part, mask=(i < count)[:, None] & near[None, :], other=0.0)
        low = tl.where((r < rank)[None, :], low, 0.0)
        after = before * strength[None, :] + _dot(low.to(tl.bfloat16), w, INTERPRETED)
        tl.store(out_at, after.to(tl.bfloat16), mask=(i < count)[:, None])


def add_adapters(
    out: torch.Tensor,
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    gain: torch.Tensor,
    bounds: tuple[int, ...],
    tiles: torch.Tensor,
    shape: Shape,
    pdl: bool = False,
) -> None:
    """out[i] = out[i] * gain[a] + x[i] @ down[a].T @ up[a].T for each row i in `tiles`, in place. Capturable.

    out: bf16, or float32 (an adapter's rows are rounded to bf16 in either) [rows, n], up to three modules side by side that end at `bounds`
    (multiples of 16); x: bf16 [rows, k]; down: bf16 [adapters, modules * rank, k]; up: bf16 [adapters, n, rank] with the scale in it; gain:
    bf16 [adapters, n], ones but for DoRA; rank: the pool's, a power of two from 16 on; tiles: int32, of `list_tiles`.
    """
    (adapters, n, rank), wide, k = up.shape, down.shape[1], x.shape[1]
    assert down.shape == (adapters, len(bounds) * rank, k) and gain.shape == (adapters, n) and bounds[-1] == n
    count, splits = tiles.numel() // (HEADER + shape.rows), triton.cdiv(k, shape.span)
    parts = torch.empty(splits, count * shape.rows, wide, dtype=torch.float32, device=x.device)
    # Wide outputs have blocks enough, and fewer programs then need not wait for others to end.
    widest = 256 if shape.rows <= 16 and n >= 8192 else 128
    columns = next(size for size in (256, 128, 64, 32, 16) if size <= widest and all(bound % size == 0 for bound in bounds))
    ends = (*bounds[:-1], n, n)[:2]
    sizes = {"WIDE": wide, "RANK": rank, "ROWS": shape.rows, "HEADER": HEADER, "INTERPRETED": not x.is_cuda, "PDL": pdl}
    extra = {"launch_pdl": True} if pdl else {}
    _shrink_kernel[(count, wide // 16, splits)](
        x, down, parts, tiles, x.stride(0), parts.stride(0), K=k, COLUMNS=16, SPAN=shape.span, DEPTH=shape.depth, num_warps=4, **sizes, **extra
    )  # fmt: skip
    _expand_kernel[(count, n // columns)](
        parts, up, gain, out, tiles, *ends, parts.stride(0), out.stride(0), N=n, COLUMNS=columns, SPLITS=splits,
        num_warps=8 if columns > 128 else 4, **sizes, **extra,
    )  # fmt: skip
