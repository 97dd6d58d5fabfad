"""Launch of decode.cu."""

from pathlib import Path

import torch

from altiplano_kernels.cuda_program import build, struct

SOURCE = Path(__file__).with_name("decode.cu")
KINDS = {torch.bfloat16: 0, torch.int8: 1, torch.float8_e4m3fn: 2}
_Args = struct(
    "Args", "query", "cache", "scales", "tables", "slots", "positions", "out", "stride_query:i", "stride_out:i", "stride_table:i",
    "softmax_scale:f",
)  # fmt: skip


def fits(heads: int, kv_heads: int, head_dim: int, page: int) -> bool:
    """Whether the shape is one that the kernel can be compiled for."""
    return head_dim in (64, 128) and heads % kv_heads == 0 and heads // kv_heads <= 8 and page % 16 == 0


def decode_few(
    query: torch.Tensor,
    cache: torch.Tensor,
    scales: torch.Tensor | None,
    tables: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor,
    heads: int,
    cluster: int = 8,
    depth: int = 2,
    warps: int = 4,
    pdl: bool = True,
) -> torch.Tensor:
    """Attention of one token per row over cached positions 0 … position, its own included.

    Tensors as for `paged_attention.kernel.decode`. The kernel before it in the stream may be the one that writes the query and the
    newest keys and values, but `positions`, `slots`, `tables` and all older keys must come from kernels that ended before that one
    let this one start. cluster: blocks per row and KV head, 1 to 16;
    depth: tiles of 16 tokens per warp on their way.
    """
    _, _, kv_heads, page, dim = cache.shape
    options = {
        "HEAD_DIM": dim, "GROUP": heads // kv_heads, "KV_HEADS": kv_heads, "PAGE": page, "CLUSTER": cluster, "WARPS": warps,
        "DEPTH": depth, "KIND": KINDS[cache.dtype],
    }  # fmt: skip
    kernel = build(SOURCE, "few_rows_attention", tuple(options.items()), query.device.index)
    kernel.allow(0, large_cluster=cluster > 8)
    arguments = _Args(
        query.data_ptr(), cache.data_ptr(), 0 if scales is None else scales.data_ptr(), tables.data_ptr(), slots.data_ptr(),
        positions.data_ptr(), out.data_ptr(), query.stride(0), out.stride(0), tables.stride(0), dim**-0.5 * 1.4426950408889634,
    )  # fmt: skip
    kernel.launch((cluster, kv_heads, query.shape[0]), warps * 32, arguments, pdl=pdl)
    return out
