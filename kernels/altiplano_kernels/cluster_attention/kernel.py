"""Launch of decode.cu."""

from pathlib import Path
from typing import NamedTuple

import torch

from altiplano_kernels.cuda_program import build, struct

SOURCE = Path(__file__).with_name("decode.cu")
KINDS = {torch.bfloat16: 0, torch.int8: 1, torch.float8_e4m3fn: 2}
_Args = struct(
    "Args", "query", "cache", "scales", "tables", "slots", "positions", "out", "stride_query:i", "stride_out:i", "stride_table:i",
    "fresh:i", "softmax_scale:f",
)  # fmt: skip


def fits(heads: int, kv_heads: int, head_dim: int, page: int) -> bool:
    """Whether the shape is one that the kernel can be compiled for."""
    return head_dim in (64, 128) and heads % kv_heads == 0 and heads // kv_heads <= 8 and page % 16 == 0


class Shape(NamedTuple):
    """Blocks per (row, KV head), 1 to 16; tiles of 16 tokens that a warp has on their way; warps of a block."""

    cluster: int
    depth: int
    warps: int


def choose_shape(rows: int, kv_heads: int, head_dim: int, itemsize: int) -> Shape:
    """Measured on an H200 at 1 to 256 rows of both models: clusters while there are few programs, then few warps with much in flight. Rows of
    different lengths want more warps than equal ones, because the longest must not be left alone at the end."""
    programs = rows * kv_heads
    if programs <= 64:
        return Shape(8, 1, 4)
    if programs <= (256 if itemsize == 1 else 128):
        return Shape(256 // head_dim, 1, 4)
    if itemsize == 1 or programs <= 256:
        return Shape(128 // head_dim, 1, 4)
    # At 128 rows of 3B, 1,024 programs, two warps are faster again (6.17 ms a step against 6.30 behind contexts of different lengths); at 96 rows
    # four are (6.03 ms against 6.2).
    if (programs <= 1280 and head_dim == 64) or (512 < programs < 1024 and head_dim == 128):
        return Shape(1, 1, 4)
    return Shape(1, 2, 2)


def is_fastest(rows: int, kv_heads: int, head_dim: int, itemsize: int) -> bool:
    """Whether `paged_attention`'s kernel takes longer. For many bf16 rows, of 3B from 129 on and of 1B from 161 on, it does not: at 192 to 256 rows,
    equally long or not, it saves up to 3 % of a step."""
    return itemsize == 1 or rows * kv_heads <= (1280 if head_dim == 64 else 1024)


def decode_clusters(
    query: torch.Tensor,
    cache: torch.Tensor,
    scales: torch.Tensor | None,
    tables: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor,
    heads: int,
    shape: Shape | None = None,
    pdl: bool = True,
    fresh: int = 1,
) -> torch.Tensor:
    """Attention of one token per row over cached positions 0 … position, its own included.

    Tensors as for `paged_attention.kernel.decode`. The kernel before it in the stream may be the one that writes the query and the
    newest `fresh` keys and values of each row, but `positions`, `slots`, `tables` and all older keys must come from kernels that
    ended before that one let this one start.
    """
    _, _, kv_heads, page, dim = cache.shape
    cluster, depth, warps = shape or choose_shape(query.shape[0], kv_heads, dim, cache.element_size())
    options = {
        "HEAD_DIM": dim, "GROUP": heads // kv_heads, "KV_HEADS": kv_heads, "PAGE": page, "CLUSTER": cluster, "WARPS": warps,
        "DEPTH": depth, "KIND": KINDS[cache.dtype],
    }  # fmt: skip
    kernel = build(SOURCE, "cluster_attention", tuple(options.items()), query.device.index)
    kernel.allow(0, large_cluster=cluster > 8)
    arguments = _Args(
        query.data_ptr(), cache.data_ptr(), 0 if scales is None else scales.data_ptr(), tables.data_ptr(), slots.data_ptr(),
        positions.data_ptr(), out.data_ptr(), query.stride(0), out.stride(0), tables.stride(0), fresh,
        dim**-0.5 * 1.4426950408889634,
    )  # fmt: skip
    kernel.launch((cluster, kv_heads, query.shape[0]), warps * 32, arguments, pdl=pdl)
    return out
