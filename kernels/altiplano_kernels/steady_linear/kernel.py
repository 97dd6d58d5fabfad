"""x @ w.T whose sums for a row do not depend on how many rows there are: one tiling and one order of additions for any number.

Libraries choose a kernel by the number of rows, and another kernel adds in another order. Batch-invariant inference needs the price
of one that fits all (He et al., "Defeating Nondeterminism in LLM Inference", Thinking Machines Lab, 2025).
"""

import torch
import triton
import triton.language as tl

ROWS, COLUMNS, DEPTH, STAGES, WARPS = 64, 64, 64, 4, 4


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


def linear(x: torch.Tensor, w: torch.Tensor, kind: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """`kind` [rows, n] of x: bf16 [rows, k], contiguous in k, and w: bf16 [n, k]; k: a multiple of 64. Capturable."""
    rows, (n, k) = x.shape[0], w.shape
    assert k % DEPTH == 0, f"sums over {k} do not divide by {DEPTH}"
    out = torch.empty(rows, n, dtype=kind, device=x.device)
    _steady_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(n, COLUMNS))](
        x, w, out, rows, n, x.stride(0), out.stride(0),
        K=k, ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH, STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip
    return out
