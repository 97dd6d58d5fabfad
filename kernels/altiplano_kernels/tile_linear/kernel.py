"""Launch of linear.cu: x @ w.T for 9 to 256 rows, as bf16, as float32 parts of a split K, through SwiGLU, or through the draw of a token.

The parts of a split are left for the next kernel (residual add and norm), which reads the sums anyway: no reduction kernel, no atomics,
and the order of summation never changes.
"""

import ctypes
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from altiplano_kernels.cuda_program import build, compile_ahead, compile_source
from altiplano_kernels.hopper import BOX, Map, processors_of, tensor_map

SOURCE = Path(__file__).with_name("linear.cu")
WHOLE, PARTS, GATED, DRAW = range(4)  # what becomes of the sums: KIND of linear.cu
_SHARED = 232_448 - 1024  # bytes that a block may have, less what static variables and alignment take


class Tiling(NamedTuple):
    """Groups of four warps; tiles of 64 rows in each; columns of a block; parts of K; stages of the ring; blocks for each processor; depth of a
    stage."""

    groups: int
    tiles: int
    columns: int
    splits: int
    stages: int
    resident: int = 1
    depth: int = BOX

    @property
    def rows(self) -> int:
        """Of a block."""
        return self.groups * self.tiles * 64


LEAST_ROWS = 9  # below, few_rows is faster
# Up to so many rows the tilings below were measured, by benchmarks/engine/tune_tiles.py on an H200.
SIZES = (16, 32, 64, 128, 192, 256)
_WIDE, _DEEP = Tiling(1, 1, 128, 4, 8), Tiling(1, 1, 64, 2, 6, depth=128)
_QKV = Tiling(1, 1, 64, 1, 6, depth=128)
# By kind, and n and k of the weight: a tiling for each size; None: the library's product is faster.
TUNED: dict[tuple[int, int, int], tuple[Tiling | None, ...]] = {
    (WHOLE, 3072, 2048): (_QKV, _QKV, _QKV, Tiling(1, 1, 128, 1, 4, depth=128), Tiling(1, 1, 128, 1, 8), Tiling(1, 1, 128, 1, 8)),
    (WHOLE, 5120, 3072): (None, None, _QKV, Tiling(1, 1, 128, 1, 8), None, None),
    (GATED, 16384, 2048): (
        Tiling(1, 1, 128, 1, 8), Tiling(1, 1, 128, 1, 8), Tiling(1, 1, 64, 1, 6, 2), Tiling(1, 2, 64, 1, 4, 2), Tiling(3, 1, 128, 1, 5),
        Tiling(2, 2, 128, 1, 4),
    ),
    (PARTS, 2048, 2048): (_WIDE, _DEEP, _DEEP, *[Tiling(1, 1, 128, 2, 8)] * 3),
    (PARTS, 3072, 3072): (_WIDE, _WIDE, _DEEP, Tiling(1, 2, 64, 2, 8), None, None),
    (PARTS, 2048, 8192): (
        _WIDE, _WIDE, Tiling(1, 1, 64, 4, 4, depth=128), Tiling(1, 2, 64, 4, 4, depth=128), Tiling(3, 1, 64, 4, 6), Tiling(1, 2, 64, 2, 8),
    ),
    (PARTS, 3072, 8192): (_WIDE, _WIDE, _DEEP, Tiling(1, 2, 64, 2, 8), None, None),
}  # fmt: skip
USUAL: dict[int, tuple[Tiling | None, ...]] = {
    WHOLE: (_QKV, _QKV, _QKV, Tiling(1, 1, 128, 1, 8), None, None),
    PARTS: (_DEEP, _DEEP, _DEEP, Tiling(1, 2, 64, 2, 8), None, None),
    GATED: (
        Tiling(1, 1, 128, 1, 8), Tiling(1, 1, 128, 1, 8), Tiling(1, 1, 64, 1, 3, 2, 128), Tiling(1, 2, 64, 1, 4, 2), Tiling(3, 1, 128, 1, 5),
        Tiling(2, 2, 128, 1, 4),
    ),
    DRAW: (
        None, Tiling(1, 1, 128, 1, 8), Tiling(1, 1, 128, 1, 8), Tiling(2, 1, 128, 1, 6), Tiling(3, 1, 128, 1, 5), Tiling(4, 1, 128, 1, 4),
    ),
}  # fmt: skip


def choose(rows: int, w: torch.Tensor, kind: int) -> Tiling | None:
    """The tiling for x: [rows, k] and w: [n, k] that was measured to be best, or one that is good for most; None: use the library."""
    n, k = w.shape
    # Beyond the sizes the library multiplies as fast, but it cannot draw.
    if rows < LEAST_ROWS or (rows > SIZES[-1] and kind != DRAW):
        return None
    size = min(bisect_left(SIZES, rows), len(SIZES) - 1)
    tiling = TUNED.get((kind, n, k), USUAL[kind])[size]
    return tiling if tiling is not None and fits(tiling, n, k) else None


class _Args(ctypes.Structure):
    _fields_ = [
        ("x", Map),
        ("w", Map),
        ("out", ctypes.c_void_p),
        ("rows", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("depth", ctypes.c_int),
        ("unused", ctypes.c_int),
        ("values", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("temperatures", ctypes.c_void_p),
        ("seeds", ctypes.c_void_p),
        ("steps", ctypes.c_void_p),
        ("end", ctypes.c_ubyte * 56),  # Args is a multiple of 64 bytes
    ]


def fits(tiling: Tiling, n: int, k: int) -> bool:
    """Whether w: [n, k] divides into the tiles, and their ring into shared memory."""
    return (
        n % tiling.columns == 0 and k % (tiling.splits * tiling.depth) == 0 and shared_bytes(tiling) * tiling.resident <= _SHARED
    )


def shared_bytes(tiling: Tiling) -> int:
    """Of a block's ring."""
    return tiling.stages * (tiling.rows + tiling.columns) * tiling.depth * 2 + 1024


def linear(x: torch.Tensor, w: torch.Tensor, tiling: Tiling, pdl: bool = True) -> torch.Tensor:
    """bf16 [rows, n]: x @ w.T, of one part. x: bf16 [rows, k]; w: bf16 [n, k], both contiguous. Capturable."""
    assert tiling.splits == 1, "parts are for linear_parts"
    out = torch.empty(len(x), len(w), dtype=torch.bfloat16, device=x.device)
    _launch(x, w, out, WHOLE, len(w), tiling, pdl)
    return out


def linear_parts(x: torch.Tensor, w: torch.Tensor, tiling: Tiling, pdl: bool = True) -> torch.Tensor:
    """float32 [splits, rows, n] whose sum over splits is x @ w.T; the rest as for `linear`."""
    out = torch.empty(tiling.splits, len(x), len(w), dtype=torch.float32, device=x.device)
    _launch(x, w, out, PARTS, len(w), tiling, pdl)
    return out


def swiglu_linear(x: torch.Tensor, gate_up: torch.Tensor, tiling: Tiling, pdl: bool = True) -> torch.Tensor:
    """bf16 [rows, n]: silu(x @ gate.T) * (x @ up.T). gate_up: bf16 [2 n, k], gate first; a block has half of its columns of each."""
    assert tiling.splits == 1, "silu is of the whole sum"
    out = torch.empty(len(x), len(gate_up) // 2, dtype=torch.bfloat16, device=x.device)
    _launch(x, gate_up, out, GATED, len(gate_up) // 2, tiling, pdl)
    return out


def linear_draw(
    x: torch.Tensor,
    w: torch.Tensor,
    tiling: Tiling,
    slots: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    steps: torch.Tensor,
    pdl: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best value and token of each row of x @ w.T and block, float32 and int32 [rows, `draw_blocks`], for `sampling.kernel.advance`.

    Logits are never written. slots: int32 [rows]; temperatures, seeds, steps: by slot, as for `sampling.kernel.draw`, whose noise differs by
    less than 1e-5.
    """
    assert tiling.splits == 1, "a draw is of the whole sum"
    shape = len(x), draw_blocks(len(x), len(w), tiling, processors_of(x.device))
    values = torch.empty(shape, dtype=torch.float32, device=x.device)
    ids = torch.empty(shape, dtype=torch.int32, device=x.device)
    draws = (values, ids, slots, temperatures, seeds, steps)
    _launch(x, w, None, DRAW, len(w), tiling, pdl, [tensor.data_ptr() for tensor in draws])
    return values, ids


def draw_blocks(rows: int, n: int, tiling: Tiling, processors: int) -> int:
    """Blocks that share the columns of a draw: as many as a GPU has room for."""
    return min(n // tiling.columns, max(1, processors * tiling.resident // -(-rows // tiling.rows)))


def compile_chosen(weights: Sequence[tuple[torch.Tensor, int]], most_rows: int, go_on: Callable[[], bool]) -> None:
    """`compile_ahead` of what `choose` will find for steps of up to `most_rows` rows over `weights`, each with its kind: half a second each."""
    sizes = [size for size in SIZES if size <= most_rows] or [most_rows]
    chosen = {(choose(rows, w, kind), kind) for rows in (*sizes, most_rows) for w, kind in weights}
    wanted = sorted((tiling, kind) for tiling, kind in chosen if tiling is not None)
    compile_ahead((partial(compile_tiling, tiling, kind) for tiling, kind in wanted), go_on)


def compile_tiling(tiling: Tiling, kind: int) -> bytes:
    """Machine code, which is kept for later launches; needs no GPU. Raises KernelBuildError."""
    return compile_source(SOURCE, _options(tiling, kind), "sm_90a")


def _options(tiling: Tiling, kind: int) -> dict[str, int]:
    return {
        "GROUPS": tiling.groups, "TILES": tiling.tiles, "COLUMNS": tiling.columns, "DEPTH": tiling.depth, "STAGES": tiling.stages,
        "SPLITS": tiling.splits, "RESIDENT": tiling.resident, "KIND": kind,
    }  # fmt: skip


def _launch(
    x: torch.Tensor,
    w: torch.Tensor,
    out: torch.Tensor | None,
    kind: int,
    columns: int,
    tiling: Tiling,
    pdl: bool,
    draws: Sequence[int] = (),
) -> None:
    (rows, k), n = x.shape, len(w)
    kernel = build(SOURCE, "tile_linear", tuple(_options(tiling, kind).items()), x.device.index)
    kernel.allow(shared_bytes(tiling))
    box = tiling.columns // 2 if kind == GATED else tiling.columns
    maps = (tensor_map(m.data_ptr(), len(m), k, m.stride(0), size) for m, size in ((x, tiling.rows), (w, box)))
    arguments = _Args(*maps, None if out is None else out.data_ptr(), rows, columns, k, 0, *draws)
    blocks = draw_blocks(rows, n, tiling, processors_of(x.device)) if kind == DRAW else n // tiling.columns
    grid = (-(-rows // tiling.rows), blocks, tiling.splits)
    kernel.launch(grid, tiling.groups * 128 + 32, arguments, shared_bytes(tiling), pdl=pdl)
