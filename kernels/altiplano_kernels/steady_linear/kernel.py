"""x @ w.T whose sums for a row do not depend on how many rows there are: one order of additions for any number.

Libraries choose a kernel by the number of rows, and another kernel adds in another order (He et al., "Defeating Nondeterminism in LLM Inference",
Thinking Machines Lab, 2025). On a Hopper GPU these are the products of `tile_linear`, whose sums run over k in steps of 16 from the first one of
a part on, in tiles of whatever size; so only the number of parts must be the same for all rows, and tiles may suit the number of rows.
Elsewhere, and for weights that do not divide into its tiles, one tiling in Triton fits all.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import triton
import triton.language as tl

from altiplano_kernels.cuda_program import build, compile_ahead, compile_source, struct
from altiplano_kernels.embed_norm.kernel import add_norm_parts
from altiplano_kernels.hopper import runs_on
from altiplano_kernels.swiglu.kernel import swiglu
from altiplano_kernels.tile_linear import kernel as tile
from altiplano_kernels.tile_linear.kernel import Tiling

ROWS, COLUMNS, DEPTH, STAGES, WARPS = 64, 64, 64, 4, 4  # in Triton
# Tiles for up to so many rows, of products of many columns and of others; measured on an H200 at 1, 64, 256 and 8,192 rows.
_LARGE = Tiling(2, 2, 128, 1, 4)
WIDE = {64: Tiling(1, 1, 128, 1, 8), 128: Tiling(2, 1, 128, 1, 6), 1 << 31: _LARGE}
NARROW = {64: Tiling(1, 1, 64, 1, 6, depth=128), 1024: Tiling(1, 2, 64, 1, 4, depth=128), 1 << 31: _LARGE}
LEAST_WIDE = 8192  # columns
MOST_ROWS = 2048  # whose parts are in memory at a time
GATED = Path(__file__).with_name("gated.cu")
_Gated = struct("Gated", "sums", "out", "columns:i")
LEAST_DEPTH, BLOCKS = 1024, 128  # of a part; that split sums should make, of 64 columns each


# A count of one row, or of sixteen, must not be compiled apart.
@triton.jit(do_not_specialize=["M"])
def _steady_kernel(
    x, w, out, M, N, stride_x, stride_out,
    K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    # Rows and columns past the end repeat earlier ones: cheaper than a mask, and never stored.
    x_at = x + (m % M).to(tl.int64)[:, None] * stride_x + k[None, :]
    w_at = w + (n % N).to(tl.int64)[None, :] * K + k[:, None]
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(0, K, DEPTH, num_stages=STAGES):
        acc = tl.dot(tl.load(x_at + start), tl.load(w_at + start), acc)
    at = out + m.to(tl.int64)[:, None] * stride_out + n[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def linear(x: torch.Tensor, w: torch.Tensor, kind: torch.dtype = torch.bfloat16, pdl: bool = False) -> torch.Tensor:
    """`kind` [rows, n] of x: bf16 [rows, k] and w: bf16 [n, k]; k: a multiple of 64. Capturable.

    `kind`: bf16 or float32. `pdl`: w, unlike x, was written before the kernel before this one began, and may be asked for early.
    """
    tiling = choose(len(x), w)
    if tiling is None:
        return _in_triton(x, w, kind)
    x = x.contiguous()
    return tile.linear(x, w, tiling, pdl) if kind is torch.bfloat16 else tile.linear_parts(x, w, tiling, pdl)[0]


def linear_parts(x: torch.Tensor, w: torch.Tensor, pdl: bool = False) -> torch.Tensor:
    """float32 [parts, rows, n], whose sum in their order is the product; the rest as for `linear`. The number of parts depends on w alone."""
    tiling = choose(len(x), w, parts_of(*w.shape))
    if tiling is None:
        return _in_triton(x, w, torch.float32)[None]
    return tile.linear_parts(x.contiguous(), w, tiling, pdl)


def swiglu_linear(x: torch.Tensor, gate_up: torch.Tensor, pdl: bool = False) -> torch.Tensor:
    """bf16 [rows, n]: silu(x @ gate.T) * (x @ up.T), from sums that are not rounded where there are tiles. gate_up: bf16 [2 n, k], gate first."""
    tiling = choose(len(x), gate_up)
    if tiling is None:
        return activate(linear(x, gate_up))
    return tile.swiglu_linear(x.contiguous(), gate_up, tiling, pdl)


def swiglu_sums(x: torch.Tensor, gate_up: torch.Tensor, pdl: bool = False) -> torch.Tensor:
    """[rows, 2 n] that `activate` makes of what `swiglu_linear` would have, to the bit, if nobody adds to a row."""
    return linear(x, gate_up, torch.bfloat16 if choose(len(x), gate_up) is None else torch.float32, pdl)


def activate(sums: torch.Tensor) -> torch.Tensor:
    """bf16 [rows, n] of `swiglu_sums`."""
    out = torch.empty(len(sums), sums.shape[1] // 2, dtype=torch.bfloat16, device=sums.device)
    if sums.dtype is torch.bfloat16:
        return swiglu(sums, out)
    kernel = build(GATED, "gated", (), sums.device.index)
    kernel.launch((-(-out.shape[1] // 1024), len(out), 1), 256, _Gated(sums.data_ptr(), out.data_ptr(), out.shape[1]), pdl=False)
    return out


def add_norm_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    eps: float,
    pdl: bool = False,
) -> None:
    """`embed_norm.kernel.add_norm` of the product, which is rounded to bf16 first. residual, out: bf16 [rows, n]; weight: bf16 [n]."""
    for first in range(0, len(x), MOST_ROWS):
        of = slice(first, first + MOST_ROWS)
        add_norm_parts(linear_parts(x[of], w, pdl), residual[of], weight, out[of], eps, pdl)


def add(parts: torch.Tensor) -> torch.Tensor:
    """bf16 [rows, n] of what `linear_parts` leaves, to the bit as `add_norm_parts` adds it up."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total.bfloat16()


def parts_of(n: int, k: int) -> int:
    """Parts of sums over k, so that narrow products have blocks for every processor: a power of 2."""
    parts = 1
    while 2 * parts * n <= 64 * BLOCKS and k // (2 * parts) >= LEAST_DEPTH:
        parts *= 2
    return parts


def choose(rows: int, w: torch.Tensor, parts: int = 1) -> Tiling | None:
    """None: the GPU, or the shape of w, is not for tiles."""
    n, k = w.shape
    # All tilings or none: in Triton sums are others.
    if not runs_on(w.device) or n % 128 or k % (128 * parts):
        return None
    tilings = WIDE if n >= LEAST_WIDE else NARROW
    return next(tiling for most, tiling in tilings.items() if rows <= most)._replace(splits=parts)


def compile_tilings(
    whole: Sequence[torch.Tensor], parted: Sequence[torch.Tensor], gated: Sequence[torch.Tensor], go_on: Callable[[], bool]
) -> None:
    """`compile_ahead` of what products with these weights need for any number of rows: `linear`, those that are left in parts,
    and `swiglu_linear`; last the float32 sums of the first and the last, for log-probabilities and adapters."""
    of = (
        [(w, 1, tile.WHOLE) for w in whole]
        + [(w, parts_of(*w.shape), tile.PARTS) for w in parted]
        + [(w, 1, tile.GATED) for w in gated]
        + [(w, 1, tile.PARTS) for w in (*whole, *gated)]
    )
    wanted = {(choose(rows, w, parts), kind) for rows in (*WIDE, *NARROW) for w, parts, kind in of}
    tilings = sorted((tiling, kind) for tiling, kind in wanted if tiling is not None)
    jobs: list[Callable[[], object]] = [partial(tile.compile_tiling, tiling, kind) for tiling, kind in tilings]
    compile_ahead([*jobs, partial(compile_source, GATED, {}, "sm_90a")], go_on)


def _in_triton(x: torch.Tensor, w: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    rows, (n, k) = x.shape[0], w.shape
    assert k % DEPTH == 0, f"sums over {k} do not divide by {DEPTH}"
    out = torch.empty(rows, n, dtype=kind, device=x.device)
    _steady_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(n, COLUMNS))](
        x, w, out, rows, n, x.stride(0), out.stride(0),
        K=k, ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH, STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip
    return out
