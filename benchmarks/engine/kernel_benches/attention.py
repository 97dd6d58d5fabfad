"""Attention over pages, and what writes them. Pages lie in random order, and the keys of each turn are cold."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from altiplano_kernels.cluster_attention.kernel import Shape, decode_clusters
from altiplano_kernels.kv_write.kernel import rope_and_write
from altiplano_kernels.paged_attention.kernel import DecodeWorkspace, choose_splits, choose_tiling, decode
from altiplano_kernels.prefill_attention.kernel import QUERY_TILE, list_tiles, prefill, prefill_triton
from altiplano_kernels.steady_attention import kernel as steady_attention_kernel
from kernel_benches.case import PAGE, Case, Launch, Model, bf16, each, rows_of

KINDS = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}


def line_bytes(model: Model, kind: str) -> int:
    """Keys and values of one token; 8-bit ones have a scale of two bytes each per head."""
    return 2 * model.kv_heads * (2 * model.dim if kind == "bf16" else model.dim + 2)


@dataclass(frozen=True)
class Paged:
    """`count` sequences of `context` tokens in pages of their own. cache, scales: as in `paged_attention.kernel.decode`, one per turn."""

    caches: Sequence[tuple[torch.Tensor, torch.Tensor | None]]
    tables: torch.Tensor
    slots: torch.Tensor


def paged(model: Model, count: int, context: int, kind: str, device: str, turns: int) -> Paged:
    width = -(-context // PAGE)
    shape = (count * width, 2, model.kv_heads, PAGE, model.dim)
    caches: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for _ in range(turns):
        if kind == "bf16":
            caches.append((bf16(*shape, device=device), None))
        else:
            # As bytes of e4m3 these are numbers up to 1.9.
            codes = torch.randint(64, shape, dtype=torch.int8, device=device).view(KINDS[kind])
            caches.append((codes, torch.full(shape[:-1], 0.01, dtype=torch.float16, device=device)))
    tables = torch.randperm(count * width, device=device).to(torch.int32).view(count, width)
    return Paged(caches, tables, torch.arange(count, dtype=torch.int32, device=device))


def decode_case(kernel: str, model: Model, rows: int, context: int, kind: str, choice: Sequence[int] = ()) -> Case:
    """choice: instead of the kernel's own; a `Shape` of clusters, or splits, tile, stages and warps."""

    def prepare(device: str, turns: int) -> list[Launch]:
        pages = paged(model, rows, context, kind, device, turns)
        at = torch.full((rows,), context - 1, dtype=torch.int32, device=device)
        query, out = (bf16(rows, model.query, device=device) for _ in range(2))
        where = pages.tables, pages.slots, at, out
        if kernel == "cluster_attention":
            shape = Shape(*choice) if choice else None
            return each(lambda cache: decode_clusters(query, *cache, *where, model.heads, shape), pages.caches)
        sizes = rows, model.kv_heads, model.dim
        splits, tile, stages, warps = choice or (choose_splits(*sizes), *choose_tiling(*sizes))
        work = DecodeWorkspace(*sizes, device, splits)
        return each(
            lambda cache: decode(query, *cache, *where, work, model.heads, splits, tile, stages, warps, True), pages.caches
        )

    moved = rows * (context * line_bytes(model, kind) + 2 * 2 * model.query)
    return Case(
        kernel, model.name, f"{kind}, {rows_of(rows)}, context {context}", moved, 4 * rows * model.query * context, prepare
    )


def cluster_attention(model: Model) -> Iterator[Case]:
    usual, many = model.contexts
    for rows in (1, 8, *model.decodes):
        yield decode_case("cluster_attention", model, rows, usual, "bf16")
    for kind in KINDS:
        yield decode_case("cluster_attention", model, model.decodes[-1], many, kind)


def paged_attention(model: Model) -> Iterator[Case]:
    usual, many = model.contexts
    for rows in (8, *model.decodes):
        yield decode_case("paged_attention", model, rows, usual, "bf16")
    for kind in KINDS:
        yield decode_case("paged_attention", model, model.decodes[-1], many, kind)


def prefill_attention(model: Model) -> Iterator[Case]:
    count, tokens = model.prompts
    for kind in KINDS:
        yield prefill_case(model, count, tokens, 0, kind)
    # A chunk of a long prompt.
    yield prefill_case(model, 1, tokens // 2, model.contexts[1] - tokens // 2, "bf16")


def prefill_case(
    model: Model,
    count: int,
    tokens: int,
    start: int,
    kind: str,
    choice: tuple[int, int, int, int] | None = None,
) -> Case:
    """choice: rows and keys of a tile, stages and warps of Triton's kernel; without it the kernel that a step takes."""

    def prepare(device: str, turns: int) -> list[Launch]:
        pages = paged(model, count, start + tokens, kind, device, turns)
        chunks = [(i * tokens, tokens, start, i) for i in range(count)]
        tiles = torch.tensor(list_tiles(chunks, choice[0] if choice else QUERY_TILE), dtype=torch.int32, device=device)
        query, out = (bf16(count * tokens, model.query, device=device) for _ in range(2))
        where = pages.tables, tiles, out, model.heads
        if choice:
            return each(lambda cache: prefill_triton(query, *cache, *where, *choice), pages.caches)
        return each(lambda cache: prefill(query, *cache, *where), pages.caches)

    pairs = tokens * start + tokens * (tokens + 1) // 2
    moved = count * ((start + tokens) * line_bytes(model, kind) + 2 * 2 * tokens * model.query)
    words = f"{kind}, {count} x {tokens} tokens" + (f" behind {start}" if start else "")
    return Case("prefill_attention", model.name, words, moved, 4 * count * model.query * pairs, prepare)


def steady_attention(model: Model) -> Iterator[Case]:
    """What the deterministic mode looks at its pages with."""
    usual, many = model.contexts
    for rows, context in ((1, usual), (1, many), *((rows, usual) for rows in model.decodes)):
        yield steady_decode_case(model, rows, context)
    yield steady_prompts_case(model, *model.prompts)


def steady_decode_case(model: Model, rows: int, context: int) -> Case:
    def prepare(device: str, turns: int) -> list[Launch]:
        pages = paged(model, rows, context, "bf16", device, turns)
        at = torch.full((rows,), context - 1, dtype=torch.int32, device=device)
        query, out = (bf16(rows, model.query, device=device) for _ in range(2))
        work = steady_attention_kernel.Workspace(model.heads // model.kv_heads, model.dim, context, device)
        where = pages.tables, pages.slots, at, out, work, model.heads
        return each(lambda cache: steady_attention_kernel.decode(query, *cache, *where, pdl=True), pages.caches)

    moved, words = rows * (context * line_bytes(model, "bf16") + 4 * model.query), f"bf16, {rows_of(rows)}, context {context}"
    return Case("steady_attention", model.name, words, moved, 4 * rows * model.query * context, prepare)


def steady_prompts_case(model: Model, count: int, tokens: int) -> Case:
    def prepare(device: str, turns: int) -> list[Launch]:
        pages = paged(model, count, tokens, "bf16", device, turns)
        tiles = torch.tensor(list_tiles([(i * tokens, tokens, 0, i) for i in range(count)]), dtype=torch.int32, device=device)
        query, out = (bf16(count * tokens, model.query, device=device) for _ in range(2))
        return each(
            lambda cache: steady_attention_kernel.chunks(query, *cache, pages.tables, tiles, out, model.heads), pages.caches
        )

    pairs, moved = tokens * (tokens + 1) // 2, count * tokens * (line_bytes(model, "bf16") + 4 * model.query)
    words = f"bf16, {count} x {tokens} tokens"
    return Case("steady_attention", model.name, words, moved, 4 * count * model.query * pairs, prepare)


def kv_write(model: Model) -> Iterator[Case]:
    for kind in KINDS:
        for rows in model.decodes:
            yield write_case(model, rows, 1, kind)
        yield write_case(model, model.prompts[0], model.prompts[1], kind)


def write_case(model: Model, count: int, tokens: int, kind: str) -> Case:
    """The last `tokens` tokens of `count` sequences."""
    rows, context = count * tokens, max(tokens, PAGE)

    def prepare(device: str, turns: int) -> list[Launch]:
        pages = paged(model, count, context, kind, device, turns)
        at = torch.arange(context - tokens, context, dtype=torch.int32, device=device).repeat(count)
        slots = pages.slots.repeat_interleave(tokens)
        angles = torch.rand(context, model.dim // 2, device=device) * 6.28
        cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
        rows_given = [bf16(rows, model.qkv, device=device) for _ in range(turns)]
        where, early = (at, slots, pages.tables, cos_sin), tokens == 1  # as the engine has it
        return each(
            lambda given: rope_and_write(given[0], *where, *given[1], model.heads, pdl=early),
            zip(rows_given, pages.caches, strict=True),
        )

    # Queries are read and written again.
    moved = rows * (2 * model.qkv + 2 * model.query + line_bytes(model, kind) + 4 * model.dim)
    return Case("kv_write", model.name, f"{kind}, {rows_of(rows)}", moved, 3 * rows * model.qkv, prepare)
