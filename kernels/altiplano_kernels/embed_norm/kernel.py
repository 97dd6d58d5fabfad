"""One program per row: gather or add, keep the sum as residual, normalise it (float32 inside, as transformers does).

With `pdl` and few rows these kernels let the next one start before they wait themselves: its blocks fill what the last blocks of the product
before leave free. So the next one, a product, may read weights before it waits, but nothing that a kernel of the same step has written.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

EARLY_ROWS = 64  # beyond, whole decode steps are as fast or 0.3 % slower


def _pdl(rows: int, pdl: bool) -> int:
    """0: no; 1: the next kernel starts after this one's wait; 2: before."""
    return (2 if rows <= EARLY_ROWS else 1) if pdl else 0


@triton.jit
def _wait(PDL: tl.constexpr):
    if PDL == 2:
        gdc_launch_dependents()
    gdc_wait()
    if PDL == 1:
        gdc_launch_dependents()


@triton.jit
def _normalise(x, weight, eps, HIDDEN: tl.constexpr):
    scale = tl.rsqrt(tl.sum(x * x, 0) / HIDDEN + eps)
    return (x * scale).to(tl.bfloat16).to(tl.float32) * weight.to(tl.float32)


@triton.jit
def _embed_kernel(
    tokens, positions, slots, table, weight, residual, out, row_positions, eps, HIDDEN: tl.constexpr, PAD: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, PAD)
    w = tl.load(weight + k, mask=k < HIDDEN, other=0.0)
    if PDL:
        _wait(PDL)
    slot = tl.load(slots + row)
    tl.store(row_positions + row, tl.load(positions + slot))
    token = tl.load(tokens + slot).to(tl.int64)
    x = tl.load(table + token * HIDDEN + k, mask=k < HIDDEN, other=0.0)
    tl.store(residual + row * HIDDEN + k, x, mask=k < HIDDEN)
    tl.store(out + row * HIDDEN + k, _normalise(x.to(tl.float32), w, eps, HIDDEN).to(tl.bfloat16), mask=k < HIDDEN)


@triton.jit
def _add_kernel(x, residual, weight, out, eps, HIDDEN: tl.constexpr, PAD: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, PAD)
    w = tl.load(weight + k, mask=k < HIDDEN, other=0.0)
    if PDL:
        _wait(PDL)
    at = row * HIDDEN + k
    total = tl.load(x + at, mask=k < HIDDEN, other=0.0).to(tl.float32) + tl.load(residual + at, mask=k < HIDDEN, other=0.0).to(
        tl.float32
    )
    total = total.to(tl.bfloat16)
    tl.store(residual + at, total, mask=k < HIDDEN)
    tl.store(out + at, _normalise(total.to(tl.float32), w, eps, HIDDEN).to(tl.bfloat16), mask=k < HIDDEN)


@triton.jit
def _add_parts_kernel(
    parts, residual, weight, out, eps, stride_part, SPLITS: tl.constexpr, HIDDEN: tl.constexpr, PAD: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, PAD)
    w = tl.load(weight + k, mask=k < HIDDEN, other=0.0)
    if PDL:
        _wait(PDL)
    at = row * HIDDEN + k
    x = tl.load(parts + at, mask=k < HIDDEN, other=0.0)
    for part in tl.static_range(1, SPLITS):
        x += tl.load(parts + part * stride_part + at, mask=k < HIDDEN, other=0.0)
    # Rounded as the product of a library would be, so that both ways agree.
    total = x.to(tl.bfloat16).to(tl.float32) + tl.load(residual + at, mask=k < HIDDEN, other=0.0).to(tl.float32)
    total = total.to(tl.bfloat16)
    tl.store(residual + at, total, mask=k < HIDDEN)
    tl.store(out + at, _normalise(total.to(tl.float32), w, eps, HIDDEN).to(tl.bfloat16), mask=k < HIDDEN)


def embed_rows(
    tokens: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    table: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    out: torch.Tensor,
    row_positions: torch.Tensor,
    eps: float,
    pdl: bool = False,
) -> None:
    """residual = table[tokens[slots]], out = rms_norm(residual), row_positions = positions[slots].

    tokens, positions: int32 [slots]; slots: int32 [rows]; table: bf16 [vocab, hidden]; residual, out: bf16 [rows, hidden];
    row_positions: int32 [rows].
    """
    rows, hidden = residual.shape
    extra = {"launch_pdl": True} if pdl else {}
    _embed_kernel[(rows,)](
        tokens, positions, slots, table, weight, residual, out, row_positions, eps,
        HIDDEN=hidden, PAD=triton.next_power_of_2(hidden), PDL=_pdl(rows, pdl), num_warps=8, **extra,
    )  # fmt: skip


def add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float, pdl: bool = False
) -> None:
    """residual += x in place, out = rms_norm(residual) * weight; all bf16 [rows, hidden]. `out` may be `x`."""
    rows, hidden = residual.shape
    extra = {"launch_pdl": True} if pdl else {}
    _add_kernel[(rows,)](
        x, residual, weight, out, eps, HIDDEN=hidden, PAD=triton.next_power_of_2(hidden), PDL=_pdl(rows, pdl), num_warps=8, **extra
    )  # fmt: skip


def add_norm_parts(
    parts: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float, pdl: bool = False
) -> None:
    """`add_norm` of x = sum of parts: float32 [splits, rows, hidden], as `linear_parts` leaves them."""
    rows, hidden = residual.shape
    extra = {"launch_pdl": True} if pdl else {}
    _add_parts_kernel[(rows,)](
        parts, residual, weight, out, eps, parts.stride(0),
        SPLITS=parts.shape[0], HIDDEN=hidden, PAD=triton.next_power_of_2(hidden), PDL=_pdl(rows, pdl), num_warps=8, **extra,
    )  # fmt: skip
