"""Times of the batched kernels and of cuBLAS at Llama 3.2's shapes, against the bytes and operations that they must move and do.

usage: PYTHONPATH=platform:kernels python benchmarks/engine/kernels.py [gemm] [decode] [prefill] [draw]; one JSON object per line.
"""

import json
import statistics
import sys
from collections.abc import Callable

import torch

from altiplano_kernels.cluster_attention.kernel import Shape, decode_clusters
from altiplano_kernels.filtered_sampling.kernel import draw_filtered
from altiplano_kernels.paged_attention.kernel import DecodeWorkspace, choose_splits, decode
from altiplano_kernels.prefill_attention.kernel import list_tiles, prefill
from altiplano_kernels.sampling.kernel import DrawWorkspace, draw

SHAPES = {"1b": (2048, 8192, 32, 8, 64), "3b": (3072, 8192, 24, 8, 128)}  # hidden, intermediate, heads, kv_heads, head_dim
PAGE = 32
BUFFERS = 8  # layers that take turns, so that no weight or page comes from the L2 cache


def graph_ms(run: Callable[[int], object], repeats: int = 8) -> float:
    """Median milliseconds of one `run(i)`, i over BUFFERS, replayed in a CUDA graph."""
    for i in range(BUFFERS):
        run(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(BUFFERS):
            run(i)
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / BUFFERS)
    return statistics.median(times)


def say(**values: object) -> None:
    print(json.dumps(values), flush=True)


def gemms(model: str) -> None:
    hidden, wide, heads, kv_heads, dim = SHAPES[model]
    shapes = {
        "qkv": ((heads + 2 * kv_heads) * dim, hidden),
        "o": (hidden, heads * dim),
        "gate_up": (2 * wide, hidden),
        "down": (hidden, wide),
    }
    for name, (n, k) in shapes.items():
        weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(BUFFERS)]
        for m in (16, 64, 128, 256, 8192):
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            ms = graph_ms(lambda i, x=x, weights=weights: x @ weights[i].T)
            say(
                kernel="gemm",
                model=model,
                name=name,
                m=m,
                us=round(ms * 1e3, 2),
                tbps=round(n * k * 2 / ms / 1e9, 2),
                tflops=round(2 * m * n * k / ms / 1e9),
            )


def cache_of(blocks: int, kv_heads: int, dim: int, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    cache = torch.randn(blocks, 2, kv_heads, PAGE, dim, device="cuda", dtype=torch.bfloat16)
    if kind is torch.bfloat16:
        return cache, None
    codes = (cache * 30).clamp(-127, 127).to(torch.int8) if kind is torch.int8 else cache.to(kind)
    return codes, torch.full((blocks, 2, kv_heads, PAGE), 0.01, device="cuda", dtype=torch.float16)


def decodes(model: str) -> None:
    _, _, heads, kv_heads, dim = SHAPES[model]
    for batch, context in ((16, 640), (64, 640), (256, 640), (256, 2048)):
        width = -(-context // PAGE)
        for kind in (torch.bfloat16, torch.float8_e4m3fn, torch.int8):
            caches = [cache_of(batch * width, kv_heads, dim, kind) for _ in range(BUFFERS)]
            tables = torch.randperm(batch * width, device="cuda").to(torch.int32).view(batch, width)
            slots = torch.arange(batch, dtype=torch.int32, device="cuda")
            at = torch.full((batch,), context - 1, dtype=torch.int32, device="cuda")
            query = torch.randn(batch, heads * dim, device="cuda", dtype=torch.bfloat16)
            out = torch.empty_like(query)
            size = 2 * batch * context * kv_heads * dim * caches[0][0].element_size()
            found = []
            base = choose_splits(batch, kv_heads, dim)
            for splits in sorted({1, base}):
                work = DecodeWorkspace(batch, kv_heads, dim, "cuda", splits)
                for tile, stages, warps in ((64, 3, 2), (32, 4, 1)):
                    try:
                        ms = graph_ms(
                            lambda i, a=(tile, stages, warps), s=splits, w=work, c=caches, q=query, o=out: decode(
                                q, *c[i], tables, slots, at, o, w, heads, s, *a
                            )
                        )
                    except Exception as error:
                        say(kernel="decode", failed=repr(error)[:100], tile=tile, stages=stages, warps=warps)
                        continue
                    found.append((round(ms * 1e3, 1), splits, tile, stages, warps))
            for cluster, depth, warps in ((1, 1, 4), (1, 2, 4), (1, 1, 8), (2, 1, 4), (4, 1, 4), (1, 2, 2), (1, 1, 2)):
                ms = graph_ms(
                    lambda i, a=(cluster, depth, warps), c=caches, q=query, o=out: decode_clusters(
                        q, *c[i], tables, slots, at, o, heads, Shape(*a)
                    )
                )
                found.append((round(ms * 1e3, 1), 0, cluster, depth, warps))  # 0: the kernel for few rows and codes
            found.sort()
            us = found[0][0]
            say(
                kernel="decode",
                model=model,
                batch=batch,
                context=context,
                kind=str(kind)[6:],
                us=us,
                tbps=round(size / us / 1e6, 2),
                all=found[:6],
            )
            del caches


def prefills(model: str) -> None:
    _, _, heads, kv_heads, dim = SHAPES[model]
    chunks, length = 8, 1024
    width = length // PAGE
    caches = [cache_of(chunks * width, kv_heads, dim, torch.bfloat16) for _ in range(BUFFERS)]
    tables = torch.randperm(chunks * width, device="cuda").to(torch.int32).view(chunks, width)
    query = torch.randn(chunks * length, heads * dim, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(query)
    flops = 4 * chunks * heads * dim * length * (length + 1) / 2
    for rows, tile, stages, warps in (
        (128, 64, 3, 8),
        (128, 64, 3, 4),
        (128, 128, 2, 8),
        (64, 64, 3, 4),
        (128, 64, 2, 4),
        (128, 128, 2, 4),
    ):
        tiles = torch.tensor(
            list_tiles([(i * length, length, 0, i) for i in range(chunks)], rows), dtype=torch.int32, device="cuda"
        )
        try:
            ms = graph_ms(lambda i, a=(rows, tile, stages, warps), t=tiles: prefill(query, *caches[i], tables, t, out, heads, *a))
        except Exception as error:
            say(kernel="prefill", failed=repr(error)[:100], rows=rows, tile=tile)
            continue
        say(
            kernel="prefill",
            model=model,
            rows=rows,
            tile=tile,
            stages=stages,
            warps=warps,
            us=round(ms * 1e3),
            tflops=round(flops / ms / 1e9),
        )


def draws(model: str) -> None:
    """Draws under filters: of flat rows (random weights), and of peaked ones as trained models give them."""
    if model != "1b":
        return  # the vocabulary is the same
    vocab, rounds = 128256, torch.zeros(1, dtype=torch.int32, device="cuda")
    for rows in (1, 8, 64, 256):
        slots = torch.arange(rows, dtype=torch.int32, device="cuda")
        seeds, work = torch.arange(rows, device="cuda"), DrawWorkspace(rows, vocab, "cuda")
        steps, temperatures = rounds.expand(rows).contiguous(), torch.full((rows,), 0.7, device="cuda")
        for name, scale in (("flat", 0.9), ("peaked", 4.0)):
            logits = [torch.randn(rows, vocab, device="cuda", dtype=torch.bfloat16) * scale for _ in range(BUFFERS)]
            plain = graph_ms(lambda i, x=logits: draw(x[i], slots, temperatures, seeds, steps, work))
            for top_k, top_p, min_p in ((0, 0.9, 0.0), (50, 1.0, 0.0), (50, 0.9, 0.0), (0, 1.0, 0.05)):
                filters = (
                    torch.full((rows,), top_k, dtype=torch.int32, device="cuda"),
                    torch.full((rows,), top_p, device="cuda"),
                    torch.full((rows,), min_p, device="cuda"),
                )
                ms = graph_ms(lambda i, x=logits, f=filters: draw_filtered(x[i], slots, temperatures, *f, seeds, steps, work))
                say(
                    kernel="draw",
                    rows=rows,
                    logits=name,
                    filters=(top_k, top_p, min_p),
                    plain_us=round(plain * 1e3, 1),
                    us=round(ms * 1e3, 1),
                    passes_at_4tbps=round(ms * 1e-3 * 4e12 / (rows * vocab * 2), 1),
                )
            ones = logits[0].float()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            ones.sort(dim=-1, descending=True, stable=True)
            end.record()
            torch.cuda.synchronize()
            say(kernel="draw", rows=rows, logits=name, sort_us=round(start.elapsed_time(end) * 1e3))


if __name__ == "__main__":
    torch.manual_seed(0)
    wanted = sys.argv[1:] or ["gemm", "decode", "prefill", "draw"]
    for size in SHAPES:
        for name, function in (("gemm", gemms), ("decode", decodes), ("prefill", prefills), ("draw", draws)):
            if name in wanted:
                function(size)
