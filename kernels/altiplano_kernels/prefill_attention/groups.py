"""Launch of prefill.cu, for compute capability 9: attention of prompt chunks by groups of warps that share keys and values."""

import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from altiplano_kernels.cuda_program import build, compile_ahead, compile_source
from altiplano_kernels.hopper import Map, processors_of, tensor_map

SOURCE = Path(__file__).with_name("prefill.cu")
ROWS = 64  # queries of a tile: `list_tiles` cuts chunks into these
KINDS = {torch.bfloat16: 0, torch.int8: 1, torch.float8_e4m3fn: 2}
_RAW = 3  # stages of codes, before they are bf16


class Shape(NamedTuple):
    """Heads of a block; stages of the ring; blocks for each processor; whether a product runs beside the softmax; keys of a tile."""

    groups: int
    stages: int = 4
    resident: int = 1
    overlap: bool = True
    keys: int = 64


def fits(heads: int, kv_heads: int, head_dim: int, page: int) -> bool:
    """Whether the shape is one that the kernel can be compiled for."""
    return head_dim in (64, 128) and heads % kv_heads == 0 and page % 8 == 0 and (page % 64 == 0 or 64 % page == 0)


class _Args(ctypes.Structure):
    _fields_ = [
        ("query", Map),
        ("cache", Map),
        ("scales", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("tiles", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("count", ctypes.c_int),
        ("stride_table", ctypes.c_int),
        ("stride_out", ctypes.c_int),
        ("softmax_scale", ctypes.c_float),
        ("end", ctypes.c_ubyte * 16),  # Args is a multiple of 64 bytes
    ]


def choose(tiles: int, heads: int, kv_heads: int, head_dim: int, page: int, coded: bool, processors: int) -> Shape:
    """As many heads a block as registers allow, and fewer where that leaves processors without work. Measured on an H200."""
    group = heads // kv_heads
    allowed = [groups for groups in (1, 2, 3, 4) if group % groups == 0 and groups * head_dim <= 384]
    few = tiles * heads // allowed[-1] < processors
    if head_dim == 128:
        if coded:  # codes become bf16 once for all heads of a block: fewer heads are more work
            return Shape(allowed[-1], stages=2, overlap=False)
        return Shape(1, stages=2, resident=2) if few else Shape(allowed[-1])
    if few:
        divides = page % 128 == 0 or 128 % page == 0
        return Shape(max(groups for groups in allowed if groups <= 2), keys=128 if divides and not coded else 64)
    return Shape(allowed[-1], overlap=not coded)


def shared_bytes(shape: Shape, head_dim: int, coded: bool) -> int:
    """Of a block."""
    codes = _RAW * shape.keys * 2 * (head_dim + 2) if coded else 0
    return (2 * shape.stages * shape.keys + 2 * shape.groups * ROWS) * head_dim * 2 + codes + 1024


def options_of(sizes: tuple[int, int, int, int], shape: Shape, kind: int) -> dict[str, int]:
    """Macros of prefill.cu for heads, KV heads, their dimension and tokens of a page."""
    heads, kv_heads, dim, page = sizes
    return {
        "HEAD_DIM": dim, "GROUP": heads // kv_heads, "KV_HEADS": kv_heads, "PAGE": page, "GROUPS": shape.groups, "KEYS": shape.keys,
        "STAGES": shape.stages, "RESIDENT": shape.resident, "OVERLAP": int(shape.overlap), "KIND": kind,
    }  # fmt: skip


def compile_shapes(sizes: tuple[int, int, int, int], kind: torch.dtype, processors: int, go_on: Callable[[], bool]) -> None:
    """`compile_ahead` of what is chosen for few tiles and for many: half a second each. `sizes` as for `options_of`, `kind`: of the cache."""
    shapes = {choose(tiles, *sizes, kind is not torch.bfloat16, processors) for tiles in (1, 1 << 20)}
    compile_ahead(
        (partial(compile_source, SOURCE, options_of(sizes, shape, KINDS[kind]), "sm_90a") for shape in sorted(shapes)), go_on
    )


def prefill_groups(
    query: torch.Tensor,
    cache: torch.Tensor,
    scales: torch.Tensor | None,
    tables: torch.Tensor,
    tiles: torch.Tensor,
    out: torch.Tensor,
    heads: int,
    shape: Shape | None = None,
) -> torch.Tensor:
    """Causal attention of chunk tokens; arguments as for `kernel.prefill`, tiles of at most ROWS queries. Capturable.

    `shape`: instead of the one that is chosen.
    """
    blocks, _, kv_heads, page, dim = cache.shape
    coded, count, processors = scales is not None, tiles.numel() // 4, processors_of(query.device)
    shape = shape or choose(count, heads, kv_heads, dim, page, coded, processors)
    shared = shared_bytes(shape, dim, coded)
    options = options_of((heads, kv_heads, dim, page), shape, KINDS[cache.dtype])
    kernel = build(SOURCE, "prefill_attention", tuple(options.items()), query.device.index)
    kernel.allow(shared)
    arguments = _Args(
        tensor_map(query.data_ptr(), query.shape[0], heads * dim, query.stride(0), ROWS),
        tensor_map(cache.data_ptr(), blocks * 2 * kv_heads * page, dim, dim, min(page, shape.keys), coded),
        0 if scales is None else scales.data_ptr(), tables.data_ptr(), tiles.data_ptr(), out.data_ptr(), count, tables.stride(0),
        out.stride(0), dim**-0.5 * 1.4426950408889634,
    )  # fmt: skip
    grid = (min(count * heads // shape.groups, processors * shape.resident), 1, 1)
    kernel.launch(grid, shape.groups * 128 + 128, arguments, shared, pdl=False)
    return out
