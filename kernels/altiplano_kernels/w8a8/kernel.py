"""W8A8: each row of the input has a scale of its own, made where the row is made, and each output channel of the weight has one.

    residual add + RMSNorm ──► codes, scale        codes · weight codes on the tensor cores ──► · scales ──► bf16
    SwiGLU                 ──► codes, scale

Scales per token and per channel are the accurate choice that still lets the scales wait until after the sum (SmoothQuant, Xiao et al.
2022, arXiv 2211.10438, calls it the finest that a product on 8 bits allows).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from altiplano_kernels.w8a8.reference import LARGEST


class Codes(NamedTuple):
    """[rows, k] in int8 or float8_e4m3fn, and float32 [rows]."""

    values: torch.Tensor
    scales: torch.Tensor


class Tiling(NamedTuple):
    """Rows, columns and depth of a tile; pipeline stages; warps."""

    rows: int
    columns: int
    depth: int
    stages: int
    warps: int


FEW = Tiling(16, 64, 256, 4, 4)
SOME = Tiling(64, 64, 128, 4, 4)
MANY = Tiling(128, 128, 128, 3, 8)


def choose_tiling(rows: int) -> Tiling:
    """By the number of rows alone, so that the order of sums is that of the batch size."""
    return FEW if rows <= 16 else SOME if rows <= 128 else MANY


@triton.jit
def _nearest_e4m3(x):
    """float32 values that FP8 holds: what a GPU's conversion rounds to. The interpreter's loses the carry into the exponent."""
    bits = x.to(tl.int32, bitcast=True)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF
    return tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, normal.to(tl.float32, bitcast=True))


@triton.jit
def _store_codes(x, codes, scales, row, k, inside, wide, LARGEST: tl.constexpr, WHOLE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Quantize a row of float32 as `reference.quantize_rows` does."""
    scale = tl.div_rn(tl.max(tl.abs(x), 0), LARGEST)
    units = x * tl.where(scale > 1e-30, tl.div_rn(1.0, tl.where(scale > 1e-30, scale, 1.0)), 0.0)
    units = tl.minimum(tl.maximum(units, -LARGEST), LARGEST)
    if WHOLE:
        # Adding and taking away 1.5 * 2^23 leaves the nearest whole number, even among equals.
        units = (units + 12582912.0) - 12582912.0
    elif INTERPRETED:
        units = _nearest_e4m3(units)
    tl.store(codes + row * wide + k, units.to(codes.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def _quantize_kernel(
    x, codes, scales, stride, wide, PAD: tl.constexpr, LARGEST: tl.constexpr, WHOLE: tl.constexpr, INTERPRETED: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, PAD)
    values = tl.load(x + row * stride + k, mask=k < wide, other=0.0).to(tl.float32)
    _store_codes(values, codes, scales, row, k, k < wide, wide, LARGEST, WHOLE, INTERPRETED)


@triton.jit
def _add_norm_kernel(
    x, residual, weight, codes, scales, eps, wide, PAD: tl.constexpr, LARGEST: tl.constexpr, WHOLE: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, PAD)
    inside = k < wide
    at = row * wide + k
    total = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    total = total.to(tl.bfloat16)
    tl.store(residual + at, total, mask=inside)
    total = total.to(tl.float32)
    normed = (total * tl.rsqrt(tl.sum(total * total, 0) / wide + eps)).to(tl.bfloat16).to(tl.float32)
    # The bf16 that the model would have had, and nothing finer: codes are of that.
    normed = (normed * tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)).to(tl.bfloat16).to(tl.float32)
    _store_codes(normed, codes, scales, row, k, inside, wide, LARGEST, WHOLE, INTERPRETED)


@triton.jit
def _swiglu_kernel(
    gate_up, codes, scales, wide, PAD: tl.constexpr, LARGEST: tl.constexpr, WHOLE: tl.constexpr, INTERPRETED: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, PAD)
    inside = k < wide
    gate = tl.load(gate_up + row * 2 * wide + k, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * wide + wide + k, mask=inside, other=0.0).to(tl.float32)
    act = (gate * tl.sigmoid(gate)).to(tl.bfloat16).to(tl.float32)
    _store_codes((act * up).to(tl.bfloat16).to(tl.float32), codes, scales, row, k, inside, wide, LARGEST, WHOLE, INTERPRETED)


@triton.jit
def _linear_kernel(
    x, x_scales, w, w_scales, out, M, N, K: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    # Rows and columns past the end repeat earlier ones: cheaper than a mask, and never stored.
    x_at = x + (m % M).to(tl.int64)[:, None] * K + k[None, :]
    w_at = w + (n % N).to(tl.int64)[None, :] * K + k[:, None]
    acc = tl.zeros((ROWS, COLUMNS), tl.int32 if WHOLE else tl.float32)
    for start in tl.range(0, K, DEPTH, num_stages=STAGES):
        inside = start + k < K
        rows = tl.load(x_at + start, mask=inside[None, :], other=0.0)
        columns = tl.load(w_at + start, mask=inside[:, None], other=0.0)
        if INTERPRETED and not WHOLE:
            # Triton's interpreter multiplies FP8 by its bits.
            acc += tl.dot(rows.to(tl.float32), columns.to(tl.float32), input_precision="ieee")
        else:
            acc = tl.dot(rows, columns, acc, out_dtype=tl.int32 if WHOLE else tl.float32)
    value = acc.to(tl.float32) * tl.load(x_scales + m % M)[:, None] * tl.load(w_scales + n % N)[None, :]
    at = out + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, value.to(tl.bfloat16), mask=(m < M)[:, None] & (n < N)[None, :])


def quantize_rows(x: torch.Tensor, kind: torch.dtype) -> Codes:
    """x: bf16 [rows, k], contiguous in k; kind: int8 or float8_e4m3fn."""
    rows, wide = x.shape
    found = _empty(rows, wide, kind, x)
    _quantize_kernel[(rows,)](x, *found, x.stride(0), wide, num_warps=8, **_options(found))
    return found


def add_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, kind: torch.dtype) -> Codes:
    """residual += x in place, and the codes of rms_norm(residual) * weight. x, residual: bf16 [rows, hidden]; weight: bf16 [hidden]."""
    rows, wide = residual.shape
    found = _empty(rows, wide, kind, x)
    _add_norm_kernel[(rows,)](x, residual, weight, *found, eps, wide, num_warps=8, **_options(found))
    return found


def swiglu(gate_up: torch.Tensor, kind: torch.dtype) -> Codes:
    """Codes of silu(gate) * up. gate_up: bf16 [rows, 2 * intermediate], gate first."""
    rows, wide = gate_up.shape[0], gate_up.shape[1] // 2
    found = _empty(rows, wide, kind, gate_up)
    _swiglu_kernel[(rows,)](gate_up, *found, wide, num_warps=8, **_options(found))
    return found


def linear(x: Codes, w: Codes, tiling: Tiling | None = None) -> torch.Tensor:
    """bf16 [rows, n] of x: [rows, k] and w: [n, k], both of the same kind. Capturable."""
    (rows, k), n = x.values.shape, len(w.values)
    tiling = tiling or choose_tiling(rows)
    out = torch.empty(rows, n, dtype=torch.bfloat16, device=x.values.device)
    _linear_kernel[(triton.cdiv(rows, tiling.rows), triton.cdiv(n, tiling.columns))](
        x.values, x.scales, w.values, w.scales, out, rows, n, K=k,
        ROWS=tiling.rows, COLUMNS=tiling.columns, DEPTH=tiling.depth, STAGES=tiling.stages, WHOLE=x.values.dtype is torch.int8,
        INTERPRETED=not out.is_cuda, num_warps=tiling.warps,
    )  # fmt: skip
    return out


def _empty(rows: int, wide: int, kind: torch.dtype, like: torch.Tensor) -> Codes:
    return Codes(torch.empty(rows, wide, dtype=kind, device=like.device), torch.empty(rows, device=like.device))


def _options(found: Codes) -> dict[str, object]:
    wide, kind = found.values.shape[1], found.values.dtype
    return {
        "PAD": triton.next_power_of_2(wide),
        "LARGEST": LARGEST[kind],
        "WHOLE": kind is torch.int8,
        "INTERPRETED": not found.values.is_cuda,
    }
