"""Times of the batched kernels and of cuBLAS at Llama 3.2's shapes, against the bytes and operations that they must move and do.

usage: PYTHONPATH=platform:kernels python benchmarks/engine/kernels.py [gemm] [decode] [prefill] [draw] [lora] [w8a8]; one JSON object per line.
"""

import json
import statistics
import sys
from collections.abc import Callable

import torch

from altiplano_kernels.cluster_attention.kernel import Shape, decode_clusters
from altiplano_kernels.filtered_sampling.kernel import draw_filtered
from altiplano_kernels.multi_lora import kernel as lora
from altiplano_kernels.multi_lora.reference import add_adapters
from altiplano_kernels.paged_attention.kernel import DecodeWorkspace, choose_splits, decode
from altiplano_kernels.prefill_attention.kernel import list_tiles, prefill
from altiplano_kernels.sampling.kernel import DrawWorkspace, draw
from altiplano_kernels.w8a8 import kernel as w8a8
from altiplano_kernels.w8a8 import reference as w8a8_reference

SHAPES = {"1b": (2048, 8192, 32, 8, 64), "3b": (3072, 8192, 24, 8, 128)}  # hidden, intermediate, heads, kv_heads, head_dim
PAGE = 32
COPY_TBPS = 4.22  # measured on one H200: read and write of device memory
MATMUL_TFLOPS = 747  # likewise: bf16, 8192 x 8192 x 8192
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
    """What filters add to plain draws: of flat rows (random weights), and of peaked ones as trained models give them."""
    if model != "1b":
        return  # the vocabulary is the same
    vocab, rounds = 128256, torch.zeros(1, dtype=torch.int32, device="cuda")
    for rows in (1, 8, 16, 64, 256):
        slots = torch.arange(rows, dtype=torch.int32, device="cuda")
        seeds, work = torch.arange(rows, device="cuda"), DrawWorkspace(rows, vocab, "cuda")
        steps, temperatures = rounds.expand(rows).contiguous(), torch.full((rows,), 0.7, device="cuda")
        for name, scale in (("flat", 0.9), ("peaked", 4.0)):
            logits = [torch.randn(rows, vocab, device="cuda", dtype=torch.bfloat16) * scale for _ in range(BUFFERS)]
            plain = graph_ms(lambda i, x=logits: draw(x[i], slots, temperatures, seeds, steps, work, True))
            for top_k, top_p, min_p in (
                (0, 0.9, 0.0),
                (0, 0.5, 0.0),
                (50, 1.0, 0.0),
                (50, 0.9, 0.0),
                (0, 1.0, 0.05),
                (0, 1.0, 0.0),
            ):
                filters = (
                    torch.full((rows,), top_k, dtype=torch.int32, device="cuda"),
                    torch.full((rows,), top_p, device="cuda"),
                    torch.full((rows,), min_p, device="cuda"),
                )

                def both(i: int, x: list[torch.Tensor] = logits, f: tuple[torch.Tensor, ...] = filters) -> None:
                    draw(x[i], slots, temperatures, seeds, steps, work, True)
                    draw_filtered(x[i], slots, temperatures, *f, seeds, steps, work, True)

                ms = graph_ms(both) - plain
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


def products(model: str) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Inputs, and where the outputs of each module end, of the four products of a layer."""
    hidden, wide, heads, kv_heads, dim = SHAPES[model]
    query, kv = heads * dim, kv_heads * dim
    return {
        "qkv": (hidden, (query, query + kv, query + 2 * kv)),
        "o": (query, (hidden,)),
        "gate_up": (hidden, (wide, 2 * wide)),
        "down": (wide, (hidden,)),
    }


def error_of(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return round(float((found.double() - wanted).norm() / wanted.norm()), 5)


def loras(model: str) -> None:
    """Updates of rows with eight adapters in turn and every ninth without one (prompts: eight of 1 024 tokens), beside the bare product."""
    for name, (k, bounds) in products(model).items():
        for rank in (8, 64):
            for rows in (1, 8, 64, 256):
                owners = [1 + i % 9 if i % 9 < 8 else 0 for i in range(rows)]
                adapter_update(model, name, rank, owners, lora.DECODE, k, bounds)
            adapter_update(model, name, rank, [1 + i // 1024 for i in range(8192)], lora.PREFILL, k, bounds)


def adapter_update(
    model: str, name: str, rank: int, owners: list[int], shape: lora.Shape, k: int, bounds: tuple[int, ...]
) -> None:
    adapters, pool, rows, n = 8, 64, len(owners), bounds[-1]
    down = torch.randn(adapters, len(bounds) * pool, k, device="cuda", dtype=torch.bfloat16) * 0.02
    up = torch.randn(adapters, n, pool, device="cuda", dtype=torch.bfloat16) * 0.02
    gain = torch.ones(adapters, n, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(BUFFERS)]
    listed = lora.list_tiles(owners, [rank] * adapters, shape, lora.most_tiles(rows, adapters, shape))
    tiles = torch.tensor(listed, dtype=torch.int32, device="cuda")
    x, out = (torch.randn(rows, wide, device="cuda", dtype=torch.bfloat16) for wide in (k, n))
    wanted, once = out.double(), out.clone()
    add_adapters(wanted, x.double(), down.double(), up.double(), gain.double(), bounds, owners, [rank] * adapters)
    early = shape is lora.DECODE  # as the engine has it
    lora.add_adapters(once, x, down, up, gain, bounds, tiles, shape, early)
    ms = graph_ms(lambda i: lora.add_adapters(out, x, down, up, gain, bounds, tiles, shape, early))
    numbers = rank * (len(bounds) * k + n)
    moved = 2 * (len(set(owners) - {0}) * numbers + rows * (k + 2 * n))
    say(
        kernel="lora",
        model=model,
        name=name,
        rank=rank,
        rows=rows,
        error=error_of(once, wanted),
        us=round(ms * 1e3, 1),
        product_us=round(graph_ms(lambda i: x @ weights[i].T) * 1e3, 1),
        megabytes=round(moved / 1e6, 2),
        percent_of_copy=round(100 * moved / ms / 1e9 / COPY_TBPS, 1),
        tflops=round(2 * rows * numbers / ms / 1e9, 1),
    )


def eight_bits(model: str) -> None:
    """W8A8 products against float64 of the same codes, their times for each tiling, and bf16 beside them; and the kernels that make codes."""
    for kind in (torch.float8_e4m3fn, torch.int8):
        for name, (k, bounds) in products(model).items():
            for rows in (16, 64, 256, 8192):
                eight_bit_product(model, name, kind, rows, bounds[-1], k)
        for rows in (16, 256, 8192):
            codes_of_rows(model, kind, rows)


def eight_bit_product(model: str, name: str, kind: torch.dtype, rows: int, n: int, k: int) -> None:
    plain = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(BUFFERS)]
    weights = [w8a8.Codes(*w8a8_reference.quantize_rows(w, kind)) for w in plain]
    raw = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
    x = w8a8.quantize_rows(raw, kind)
    wanted = w8a8_reference.linear(*x, *weights[0])
    # What a norm follows may stay in parts.
    chosen = w8a8.choose_split(rows, n, k) if name in ("o", "down") else w8a8.choose_tiling(rows, n)
    times: dict[w8a8.Tiling, float] = {}
    for tiling in {chosen, *tilings_of(rows, name)}:
        try:
            times[tiling] = graph_ms(lambda i, tiling=tiling: w8a8.linear_parts(x, weights[i], tiling, True))
        except Exception as failure:
            say(kernel="w8a8", failed=repr(failure)[:100], tiling=tiling)
    best = min(times, key=lambda tiling: times[tiling])
    ms = times[best]
    say(
        kernel="w8a8",
        model=model,
        kind=str(kind)[6:],
        name=name,
        rows=rows,
        error=error_of(w8a8.linear(x, weights[0]), wanted),
        error_of_quantizing=error_of(wanted, raw.double() @ plain[0].double().T),
        us=round(ms * 1e3, 1),
        tiling=best,
        chosen=chosen,
        chosen_us=round(times.get(chosen, float("nan")) * 1e3, 1),
        all={" ".join(map(str, tiling)): round(one * 1e3, 1) for tiling, one in sorted(times.items(), key=lambda item: item[1])},
        bf16_us=round(graph_ms(lambda i: raw @ plain[i].T) * 1e3, 1),
        megabytes=round((n * k + rows * (k + 2 * n)) / 1e6, 2),
        percent_of_copy=round(100 * (n * k + rows * (k + 2 * n)) / ms / 1e9 / COPY_TBPS, 1),
        tflops=round(2 * rows * n * k / ms / 1e9, 1),
        percent_of_twice_bf16_matmul=round(100 * 2 * rows * n * k / ms / 1e9 / (2 * MATMUL_TFLOPS), 1),
    )


def tilings_of(rows: int, name: str) -> list[w8a8.Tiling]:
    """What may be best for so many rows."""
    few = w8a8.FEW
    if rows <= 16:
        found = [few, few._replace(swapped=False), few._replace(depth=128, stages=6), w8a8.NARROW, w8a8.SOME]
    elif rows <= 256:
        narrow, many = w8a8.NARROW, w8a8.MANY
        found = [
            few._replace(rows=32),
            narrow,
            narrow._replace(depth=128, stages=5),
            w8a8.SOME,
            w8a8.Tiling(64, 128, 128, 4, 4),
            many,
        ]
    else:
        found = [w8a8.SOME, w8a8.MANY, w8a8.Tiling(128, 256, 128, 3, 8)]
    splits = (1,) if name in ("qkv", "gate_up") or rows > 256 else (1, 2, 4, 8) if name == "down" else (1, 2, 4)
    return [tiling._replace(splits=count) for tiling in found for count in splits]


def codes_of_rows(model: str, kind: torch.dtype, rows: int) -> None:
    hidden, wide = SHAPES[model][:2]
    weight = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)
    x, residual = (torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    gate_up = torch.randn(rows, 2 * wide, device="cuda", dtype=torch.bfloat16)
    makers: dict[str, tuple[Callable[[int], object], int]] = {
        "add_norm": (lambda i: w8a8.add_norm(x, residual, weight, 1e-5, kind, True), 7 * rows * hidden),
        "swiglu": (lambda i: w8a8.swiglu(gate_up, kind, True), 5 * rows * wide),
        "quantize": (lambda i: w8a8.quantize_rows(x, kind, True), 3 * rows * hidden),
    }
    if rows <= 256:
        parts = torch.randn(4, rows, hidden, device="cuda")
        makers["add_norm of 4 parts"] = (lambda i: w8a8.add_norm(parts, residual, weight, 1e-5, kind, True), 21 * rows * hidden)
    for name, (make, moved) in makers.items():
        ms = graph_ms(make)
        percent = round(100 * moved / ms / 1e9 / COPY_TBPS, 1)
        say(kernel=f"w8a8 {name}", model=model, kind=str(kind)[6:], rows=rows, us=round(ms * 1e3, 1), percent_of_copy=percent)


if __name__ == "__main__":
    torch.manual_seed(0)
    kinds = {"gemm": gemms, "decode": decodes, "prefill": prefills, "draw": draws, "lora": loras, "w8a8": eight_bits}
    wanted = sys.argv[1:] or list(kinds)
    for size in SHAPES:
        for name in wanted:
            kinds[name](size)
