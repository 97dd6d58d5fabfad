"""W8A8: each row of the input has a scale of its own, made where the row is made, and each output channel of the weight has one.

    residual add + RMSNorm ──► codes, scale        codes · weight codes on the tensor cores ──► · scales ──► bf16
    SwiGLU                 ──► codes, scale

Scales per token and per channel are the accurate choice that still lets the scales wait until after the sum (SmoothQuant, Xiao et al.
2022, arXiv 2211.10438, calls it the finest that a product on 8 bits allows).

A narrow output (o, down: 2 048 columns) has too few tiles to keep 132 processors reading, so up to a few hundred rows the sum over K is
split, and the norm that follows adds the parts in float32, in their order. Down at 16 rows was 32 programs with 48 KB on the way each,
1 TB/s and 20 µs; 128 programs should need 6. At 256 rows it was 128 tiles of 64 x 64, which load 134 MB from the L2 cache, again 20 µs;
tiles of 128 x 128 in four parts load 67 MB: 12 µs. Every kernel starts while the one before it ends, and a product has its first
weights on the way by then.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from altiplano_kernels.w8a8.reference import LARGEST


class Codes(NamedTuple):
    """[rows, k] in int8 or float8_e4m3fn, and float32 [rows]."""

    values: torch.Tensor
    scales: torch.Tensor


class Tiling(NamedTuple):
    """Rows, columns and depth of a tile; pipeline stages; warps; parts of the sum; whether columns come first on the tensor cores.

    Those want 64 of what comes first. Of FP8 fewer are converted to float16 before the product, and of sixteen rows that were 48 too many.
    """

    rows: int
    columns: int
    depth: int
    stages: int
    warps: int
    splits: int = 1
    swapped: bool = False


FEW = Tiling(16, 64, 256, 4, 4, swapped=True)
NARROW = Tiling(64, 32, 256, 3, 4)
SOME = Tiling(64, 64, 128, 4, 4)
MANY = Tiling(128, 128, 128, 3, 8)
LARGE = Tiling(128, 256, 128, 3, 8)  # of FP8 a tenth faster; of INT8 a fifth slower
BUSY = 120  # programs that keep the card's processors at work
FULL = 264  # programs of 64 rows that run at once
LEAST_ROWS = 2048  # from so many on there are enough large tiles
MOST_SPLIT_ROWS = 512  # beyond, there are enough tiles, and the parts would be many bytes


def choose_tiling(rows: int, n: int, kind: torch.dtype) -> Tiling:
    """For a whole sum. By the sizes alone, so that the order of sums is that of the batch size."""
    if rows <= FEW.rows:
        return FEW
    if rows <= SOME.rows:
        return SOME if _tiles(SOME, rows, n) >= BUSY else NARROW
    if rows >= LEAST_ROWS and kind is torch.float8_e4m3fn:
        return LARGE
    crowded = rows <= 2 * MANY.rows and _tiles(SOME, rows, n) > FULL
    return MANY if crowded or _tiles(MANY, rows, n) >= BUSY else SOME


def choose_split(rows: int, n: int, k: int, kind: torch.dtype) -> Tiling:
    """For a sum that may be left in parts."""
    if rows > MOST_SPLIT_ROWS:
        return choose_tiling(rows, n, kind)
    kinds = [(FEW, 512)] if rows <= FEW.rows else [(SOME, 512)] if rows <= SOME.rows else [(MANY, 1024), (SOME, 512)]
    for tiling, least in kinds:
        tiles, splits = _tiles(tiling, rows, n), 1
        while tiles * splits < BUSY and k >= 2 * splits * least:
            splits *= 2
        if tiles * splits >= BUSY:
            return tiling._replace(splits=splits)
    return choose_tiling(rows, n, kind)


def _tiles(tiling: Tiling, rows: int, n: int) -> int:
    return -(-rows // tiling.rows) * -(-n // tiling.columns)


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
    x, codes, scales, stride, wide,
    PAD: tl.constexpr, LARGEST: tl.constexpr, WHOLE: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, PAD)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    values = tl.load(x + row * stride + k, mask=k < wide, other=0.0).to(tl.float32)
    _store_codes(values, codes, scales, row, k, k < wide, wide, LARGEST, WHOLE, INTERPRETED)


@triton.jit
def _add_norm_kernel(
    x, residual, weight, codes, scales, eps, wide, stride_part,
    PAD: tl.constexpr, SPLITS: tl.constexpr, LARGEST: tl.constexpr, WHOLE: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, PAD)
    inside = k < wide
    strength = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    at = row * wide + k
    added = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, SPLITS):
        added += tl.load(x + part * stride_part + at, mask=inside, other=0.0)
    # Rounded as a product that is not in parts would be.
    total = added.to(tl.bfloat16).to(tl.float32) + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    total = total.to(tl.bfloat16)
    tl.store(residual + at, total, mask=inside)
    total = total.to(tl.float32)
    normed = (total * tl.rsqrt(tl.sum(total * total, 0) / wide + eps)).to(tl.bfloat16).to(tl.float32)
    # The bf16 that the model would have had, and nothing finer: codes are of that.
    normed = (normed * strength).to(tl.bfloat16).to(tl.float32)
    _store_codes(normed, codes, scales, row, k, inside, wide, LARGEST, WHOLE, INTERPRETED)


@triton.jit
def _swiglu_kernel(
    gate_up, codes, scales, wide,
    PAD: tl.constexpr, LARGEST: tl.constexpr, WHOLE: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, PAD)
    inside = k < wide
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    gate = tl.load(gate_up + row * 2 * wide + k, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * wide + wide + k, mask=inside, other=0.0).to(tl.float32)
    act = (gate * tl.sigmoid(gate)).to(tl.bfloat16).to(tl.float32)
    _store_codes((act * up).to(tl.bfloat16).to(tl.float32), codes, scales, row, k, inside, wide, LARGEST, WHOLE, INTERPRETED)


@triton.jit
def _multiply(rows, columns, acc, SWAPPED: tl.constexpr, WHOLE: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc + rows [ROWS, DEPTH] times columns [DEPTH, COLUMNS], or that transposed."""
    if INTERPRETED and not WHOLE:
        # Triton's interpreter multiplies FP8 by its bits.
        rows, columns = rows.to(tl.float32), columns.to(tl.float32)
        more = (
            tl.dot(tl.trans(columns), tl.trans(rows), input_precision="ieee")
            if SWAPPED
            else tl.dot(rows, columns, input_precision="ieee")
        )
        return acc + more
    elif SWAPPED:
        return tl.dot(tl.trans(columns), tl.trans(rows), acc, out_dtype=acc.dtype)
    else:
        return tl.dot(rows, columns, acc, out_dtype=acc.dtype)


@triton.jit
def _linear_kernel(
    x, x_scales, w, w_scales, out, M, N, stride_part, K: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr, SWAPPED: tl.constexpr,
    WHOLE: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(2)
    k = tl.arange(0, DEPTH)
    STEPS: tl.constexpr = (K + SPLITS * DEPTH - 1) // (SPLITS * DEPTH)
    begin = part * STEPS * DEPTH
    # Rows and columns past the end repeat earlier ones: cheaper than a mask, and never stored.
    x_at = x + (m % M).to(tl.int64)[:, None] * K + k[None, :]
    w_at = w + (n % N).to(tl.int64)[None, :] * K + k[:, None]
    # The first weights of small tiles are asked for before the kernel before has ended, and used last.
    EARLY: tl.constexpr = ROWS <= 64
    inside = begin + k < K
    if EARLY:
        w_scale = tl.load(w_scales + n % N)
        first_columns = tl.load(w_at + begin, mask=inside[:, None], other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if EARLY:
        x_scale = tl.load(x_scales + m % M)
        first_rows = tl.load(x_at + begin, mask=inside[None, :], other=0.0)
        begin += DEPTH
    acc = tl.zeros((COLUMNS, ROWS) if SWAPPED else (ROWS, COLUMNS), tl.int32 if WHOLE else tl.float32)
    for start in tl.range(begin, (part + 1) * STEPS * DEPTH, DEPTH, num_stages=STAGES):
        inside = start + k < K
        rows = tl.load(x_at + start, mask=inside[None, :], other=0.0)
        columns = tl.load(w_at + start, mask=inside[:, None], other=0.0)
        acc = _multiply(rows, columns, acc, SWAPPED, WHOLE, INTERPRETED)
    if EARLY:
        acc = _multiply(first_rows, first_columns, acc, SWAPPED, WHOLE, INTERPRETED)
    else:
        # Where they would take registers that large sums need.
        w_scale, x_scale = tl.load(w_scales + n % N), tl.load(x_scales + m % M)
    if SWAPPED:
        acc = tl.trans(acc)
    value = acc.to(tl.float32) * x_scale[:, None] * w_scale[None, :]
    at = out + part * stride_part + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, value.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def quantize_rows(x: torch.Tensor, kind: torch.dtype, pdl: bool = False) -> Codes:
    """x: bf16 [rows, k], contiguous in k; kind: int8 or float8_e4m3fn."""
    rows, wide = x.shape
    found = _empty(rows, wide, kind, x)
    _quantize_kernel[(rows,)](x, *found, x.stride(0), wide, num_warps=8, **_options(found, pdl))
    return found


def add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, kind: torch.dtype, pdl: bool = False
) -> Codes:
    """residual += x in place, and the codes of rms_norm(residual) * weight.

    x: bf16 [rows, hidden], or bf16 or float32 [splits, rows, hidden] to be added up; residual: bf16 [rows, hidden]; weight: bf16 [hidden].
    """
    rows, wide = residual.shape
    found, splits = _empty(rows, wide, kind, x), x.shape[0] if x.dim() == 3 else 1
    _add_norm_kernel[(rows,)](
        x, residual, weight, *found, eps, wide, x.stride(0), SPLITS=splits, num_warps=8, **_options(found, pdl)
    )  # fmt: skip
    return found


def swiglu(gate_up: torch.Tensor, kind: torch.dtype, pdl: bool = False) -> Codes:
    """Codes of silu(gate) * up. gate_up: bf16 [rows, 2 * intermediate], gate first."""
    rows, wide = gate_up.shape[0], gate_up.shape[1] // 2
    found = _empty(rows, wide, kind, gate_up)
    _swiglu_kernel[(rows,)](gate_up, *found, wide, num_warps=8, **_options(found, pdl))
    return found


def linear(x: Codes, w: Codes, tiling: Tiling | None = None, pdl: bool = False) -> torch.Tensor:
    """bf16 [rows, n] of x: [rows, k] and w: [n, k], both of the same kind. Capturable."""
    tiling = tiling or choose_tiling(len(x.values), len(w.values), x.values.dtype)
    assert tiling.splits == 1, "parts are for linear_parts"
    return _launch(x, w, tiling, torch.bfloat16, pdl)[0]


def linear_parts(x: Codes, w: Codes, tiling: Tiling | None = None, pdl: bool = False) -> torch.Tensor:
    """[splits, rows, n] whose sum is the product, for `add_norm`: float32, or bf16 where one part is best. Capturable."""
    tiling = tiling or choose_split(len(x.values), len(w.values), w.values.shape[1], x.values.dtype)
    return _launch(x, w, tiling, torch.float32 if tiling.splits > 1 else torch.bfloat16, pdl)


def _launch(x: Codes, w: Codes, tiling: Tiling, kind: torch.dtype, pdl: bool) -> torch.Tensor:
    """[splits, rows, n] in `kind`."""
    (rows, k), n = x.values.shape, len(w.values)
    out = torch.empty(tiling.splits, rows, n, dtype=kind, device=x.values.device)
    extra = {"launch_pdl": True} if pdl else {}
    _linear_kernel[(triton.cdiv(rows, tiling.rows), triton.cdiv(n, tiling.columns), tiling.splits)](
        x.values, x.scales, w.values, w.scales, out, rows, n, out.stride(0), K=k,
        ROWS=tiling.rows, COLUMNS=tiling.columns, DEPTH=tiling.depth, STAGES=tiling.stages, SPLITS=tiling.splits, SWAPPED=tiling.swapped,
        WHOLE=x.values.dtype is torch.int8, INTERPRETED=not out.is_cuda, PDL=pdl, num_warps=tiling.warps, **extra,
    )  # fmt: skip
    return out


def _empty(rows: int, wide: int, kind: torch.dtype, like: torch.Tensor) -> Codes:
    return Codes(torch.empty(rows, wide, dtype=kind, device=like.device), torch.empty(rows, device=like.device))


def _options(found: Codes, pdl: bool) -> dict[str, object]:
    wide, kind = found.values.shape[1], found.values.dtype
    return {
        "PAD": triton.next_power_of_2(wide),
        "LARGEST": LARGEST[kind],
        "WHOLE": kind is torch.int8,
        "INTERPRETED": not found.values.is_cuda,
        "PDL": pdl,
    } | ({"launch_pdl": True} if pdl else {})
