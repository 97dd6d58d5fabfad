"""x @ w.T for 16 to 256 rows. The weight is read once; enough programs for the whole card come from splitting K.

The parts of a split are left in float32 for the next kernel (residual add and norm, or RoPE), which reads the sums anyway: no
reduction kernel, no atomics, and the order of summation never changes.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


class Tiling(NamedTuple):
    """Rows, columns and depth of a tile; parts that K is split into; pipeline stages; warps; whether the first weights are asked for
    before the wait for the kernel before."""

    rows: int
    columns: int
    depth: int
    splits: int
    stages: int
    warps: int
    early: bool = False


PARTS = Tiling(64, 64, 128, 4, 4, 4)
GATED = Tiling(64, 32, 128, 1, 3, 4)
MOST_ROWS = 64  # beyond, cuBLAS is faster
# Measured on an H200 by benchmarks/engine/linears.py: products of weights [n, k] whose best tiling is another.
TUNED = {
    (3072, 8192): Tiling(64, 64, 128, 2, 4, 4),
    (3072, 3072): Tiling(64, 64, 128, 2, 4, 4, True),
}


def choose_tiling(n: int, k: int, gated: bool = False) -> Tiling:
    """The tiling that was measured to be best for w: [n, k], or one that is good for most."""
    return TUNED.get((n, k), GATED if gated else PARTS)


def fits(tiling: Tiling, n: int, k: int) -> bool:
    """Whether a weight [n, k] divides into the tiles."""
    return n % tiling.columns == 0 and k % (tiling.splits * tiling.depth) == 0


@triton.jit
def _linear_kernel(
    x, w, out, M, stride_x, stride_part,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SPLITS: tl.constexpr,
    STAGES: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(2)
    k = tl.arange(0, DEPTH)
    # Rows past the end repeat earlier ones: cheaper than a mask, and never stored.
    x_at = x + (m % M)[:, None] * stride_x + k[None, :]
    w_at = w + n[None, :] * K + k[:, None]
    begin = part * (K // SPLITS)
    end = begin + K // SPLITS
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    if EARLY:
        first = tl.load(w_at + begin)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if EARLY:
        acc = tl.dot(tl.load(x_at + begin), first, acc)
        begin += DEPTH
    for start in tl.range(begin, end, DEPTH, num_stages=STAGES):
        acc = tl.dot(tl.load(x_at + start), tl.load(w_at + start), acc)
    target = out + part * stride_part + m[:, None] * N + n[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=(m < M)[:, None])


@triton.jit
def _swiglu_linear_kernel(
    x, w, out, M, stride_x,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    x_at = x + (m % M)[:, None] * stride_x + k[None, :]
    gate_at = w + n[None, :] * K + k[:, None]
    up_at = gate_at + N * K
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    begin = 0
    if EARLY:
        first_gate, first_up = tl.load(gate_at), tl.load(up_at)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if EARLY:
        rows = tl.load(x_at)
        gate = tl.dot(rows, first_gate, gate)
        up = tl.dot(rows, first_up, up)
        begin += DEPTH
    for start in tl.range(begin, K, DEPTH, num_stages=STAGES):
        rows = tl.load(x_at + start)
        gate = tl.dot(rows, tl.load(gate_at + start), gate)
        up = tl.dot(rows, tl.load(up_at + start), up)
    target = out + m[:, None] * N + n[None, :]
    tl.store(target, (gate * tl.sigmoid(gate) * up).to(tl.bfloat16), mask=(m < M)[:, None])


def linear_parts(x: torch.Tensor, w: torch.Tensor, tiling: Tiling, pdl: bool = False) -> torch.Tensor:
    """float32 [splits, rows, n] whose sum over splits is x @ w.T. x: bf16 [rows, k]; w: bf16 [n, k]; n, k: multiples of the tile."""
    rows, (n, k) = x.shape[0], w.shape
    out = torch.empty(tiling.splits, rows, n, dtype=torch.float32, device=x.device)
    extra = {"launch_pdl": True} if pdl else {}
    _linear_kernel[(triton.cdiv(rows, tiling.rows), n // tiling.columns, tiling.splits)](
        x, w, out, rows, x.stride(0), out.stride(0),
        N=n, K=k, ROWS=tiling.rows, COLUMNS=tiling.columns, DEPTH=tiling.depth, SPLITS=tiling.splits, STAGES=tiling.stages,
        EARLY=tiling.early, PDL=pdl, num_warps=tiling.warps, **extra,
    )  # fmt: skip
    return out


def linear(x: torch.Tensor, w: torch.Tensor, tiling: Tiling, pdl: bool = False) -> torch.Tensor:
    """bf16 [rows, n]: x @ w.T, with one part. x: bf16 [rows, k]; w: bf16 [n, k]; n, k: multiples of the tile."""
    rows, (n, k) = x.shape[0], w.shape
    out = torch.empty(rows, n, dtype=torch.bfloat16, device=x.device)
    extra = {"launch_pdl": True} if pdl else {}
    _linear_kernel[(triton.cdiv(rows, tiling.rows), n // tiling.columns, 1)](
        x, w, out, rows, x.stride(0), 0,
        N=n, K=k, ROWS=tiling.rows, COLUMNS=tiling.columns, DEPTH=tiling.depth, SPLITS=1, STAGES=tiling.stages,
        EARLY=tiling.early, PDL=pdl, num_warps=tiling.warps, **extra,
    )  # fmt: skip
    return out


def swiglu_linear(x: torch.Tensor, gate_up: torch.Tensor, tiling: Tiling, pdl: bool = False) -> torch.Tensor:
    """bf16 [rows, n]: silu(x @ gate.T) * (x @ up.T). x: bf16 [rows, k]; gate_up: bf16 [2 n, k], gate first."""
    rows, (double, k) = x.shape[0], gate_up.shape
    out = torch.empty(rows, double // 2, dtype=torch.bfloat16, device=x.device)
    extra = {"launch_pdl": True} if pdl else {}
    _swiglu_linear_kernel[(triton.cdiv(rows, tiling.rows), double // 2 // tiling.columns)](
        x, gate_up, out, rows, x.stride(0),
        N=double // 2, K=k, ROWS=tiling.rows, COLUMNS=tiling.columns, DEPTH=tiling.depth, STAGES=tiling.stages,
        EARLY=tiling.early, PDL=pdl, num_warps=tiling.warps, **extra,
    )  # fmt: skip
    return out
