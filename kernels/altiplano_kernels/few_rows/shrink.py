"""The first half of an update by adapters in a step of a few rows: x · down for each row's own adapter. The second half is in adapters.cuh.

A product of few_rows runs behind it and waits for it, but asks for its weights before: so this kernel lets the product start at once, and what
it takes itself is hidden behind those weights in part. It, too, asks for its weights before it waits, and multiplies them as soon as the
rows are there: pieces of the sum lie in different warps, because a warp's products wait for each other.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from altiplano_kernels.multi_lora.kernel import DECODE, HEADER, dot

COLUMNS = 16  # of `down` for a program
SPAN = 1024  # inputs of a program, whose sum is a part of its own
PIECES = 8  # of a program's sum, one a warp


class LowRank(NamedTuple):
    """What a product of few_rows adds to the rows that have an adapter: the sums that `shrink` leaves, and how they go on.

    owners: int32 [rows, 2], a row's adapter from 1 (0: none) and its rank, written before the step; parts: float32
    [splits, rows or more, modules * rank]; up: bf16 [adapters, n, rank] with the scale in it; gain: bf16 [adapters, n], ones but for DoRA; bounds:
    where each module's outputs end. rank: the pool's; what lies behind an adapter's own rank is zero in `up` and in its `down`.
    """

    owners: torch.Tensor
    parts: torch.Tensor
    up: torch.Tensor
    gain: torch.Tensor
    bounds: tuple[int, ...]


def splits_of(k: int) -> int:
    """Parts of a sum over k inputs."""
    return -(-k // SPAN)


@triton.jit
def _shrink_kernel(
    x, gamma, down, parts, tiles, stride_x, stride_part,
    K: tl.constexpr, WIDE: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, HEADER: tl.constexpr, COLUMNS: tl.constexpr,
    SPAN: tl.constexpr, PIECES: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tile, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if PDL:
        gdc_launch_dependents()
    head = tiles + tile * (HEADER + ROWS)
    adapter, count, rank = tl.load(head), tl.load(head + 1), tl.load(head + 2)
    i, c = tl.arange(0, ROWS), block * COLUMNS + tl.arange(0, COLUMNS)
    # [PIECES, depth of a piece]
    k = part * SPAN + tl.arange(0, PIECES)[:, None] * (SPAN // PIECES) + tl.arange(0, SPAN // PIECES)[None, :]
    # Columns behind the adapter's own rank are never read.
    active = (adapter > 0) & (block * COLUMNS % RANK < rank)
    row = tl.load(head + HEADER + i, mask=active & (i < count), other=0).to(tl.int64)
    w_at = down + (adapter - 1).to(tl.int64) * WIDE * K + c[None, None, :] * K + k[:, :, None]
    w = tl.load(w_at, mask=active & (k < K)[:, :, None], other=0.0)
    weight = tl.load(gamma + k, mask=active & (k < K), other=0.0).to(tl.float32)
    if PDL:
        # Who comes next takes the end of this kernel for the end of all before it, so one program waits in any case. The others make room for
        # the product if they have nothing to do.
        waits = active | (tile + block + part == 0)
        if waits:
            gdc_wait()
    if active:
        x_at = x + row[None, :, None] * stride_x + k[:, None, :]
        values = tl.load(x_at, mask=(i < count)[None, :, None] & (k < K)[:, None, :], other=0.0)
        values = (values.to(tl.float32) * weight[:, None, :]).to(tl.bfloat16)
        total = tl.sum(dot(values, w, INTERPRETED), 0)
        tl.store(parts + part * stride_part + row[:, None] * WIDE + c[None, :], total, mask=(i < count)[:, None])


def shrink(
    x: torch.Tensor, down: torch.Tensor, low: LowRank, tiles: torch.Tensor, gamma: torch.Tensor, pdl: bool = False
) -> None:
    """low.parts.sum(0)[i] = (x[i] * gamma) @ down[a].T for each row i in `tiles` and its adapter a. Other rows, and columns behind a's rank,
    are left as they are. Capturable.

    The norm's factor of a row is left to the product, which has it anyway. x: bf16 [rows, k]; down: bf16 [adapters, modules * rank, k]; tiles:
    int32, of `multi_lora.kernel.list_tiles` for `DECODE`; gamma: bf16 [k or more], ones where there is no norm. With `pdl` the next kernel starts
    at once: no kernel of this step may write what that one reads before it waits, nor `down`, `tiles` and `gamma`.
    """
    parts, (_, wide, k) = low.parts, down.shape
    assert parts.shape[0] == splits_of(k) and parts.shape[2] == wide and parts[0].is_contiguous() and wide % COLUMNS == 0
    extra = {"launch_pdl": True} if pdl else {}
    _shrink_kernel[(tiles.numel() // (HEADER + DECODE.rows), wide // COLUMNS, parts.shape[0])](
        x, gamma, down, parts, tiles, x.stride(0), parts.stride(0), K=k, WIDE=wide, RANK=low.up.shape[2], ROWS=DECODE.rows, HEADER=HEADER,
        COLUMNS=COLUMNS, SPAN=SPAN, PIECES=PIECES, INTERPRETED=not x.is_cuda, PDL=pdl, num_warps=PIECES,
        **extra,
    )  # fmt: skip
