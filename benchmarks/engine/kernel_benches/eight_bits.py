"""W8A8: products of codes, and the kernels that make codes of rows. In decode steps, norms add the parts that o and down leave."""

from collections.abc import Callable, Iterator

import torch

from altiplano_kernels.w8a8 import kernel, reference
from kernel_benches.case import Case, Launch, Model, bf16, copies, each, product_bytes, rows_of

KINDS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
EPS, SPLITS = 1e-5, 4


def w8a8(model: Model) -> Iterator[Case]:
    for kind in KINDS:
        for name in ("qkv", "o", "gate_up", "down"):
            for rows in (16, *model.decodes) if kind == "fp8" else model.decodes:
                yield product_case(model, name, rows, kind)
        yield product_case(model, "gate_up", model.tokens, kind)
    yield from row_cases(model, model.decodes[-1], "fp8")
    yield from row_cases(model, model.tokens, "fp8")


def choose(model: Model, name: str, rows: int, kind: str) -> kernel.Tiling:
    """The kernel's own choice; what a norm follows may stay in parts."""
    n, k = model.weights[name]
    if name in ("o", "down"):
        return kernel.choose_split(rows, n, k, KINDS[kind])
    return kernel.choose_tiling(rows, n, KINDS[kind])


def product_case(model: Model, name: str, rows: int, kind: str, choice: kernel.Tiling | None = None) -> Case:
    n, k = model.weights[name]
    tiling = choice or choose(model, name, rows, kind)
    splits, multiply = tiling.splits, kernel.linear_parts if name in ("o", "down") else kernel.linear

    def prepare(device: str, turns: int) -> list[Launch]:
        x, w = (codes(count, k, kind, device) for count in (rows, n))
        return each(lambda values: multiply(x, kernel.Codes(values, w.scales), tiling, pdl=True), copies(w.values, turns))

    moved = product_bytes(0, n, k, 1) + 4 * n + rows * (k + 4 + (4 * splits if splits > 1 else 2) * n)
    return Case("w8a8", model.name, f"{name}, {kind}, {rows_of(rows)}", moved, 2 * rows * n * k, prepare)


def codes(rows: int, k: int, kind: str, device: str) -> kernel.Codes:
    return kernel.Codes(*reference.quantize_rows(bf16(rows, k, device=device), KINDS[kind]))


def row_cases(model: Model, rows: int, kind: str) -> Iterator[Case]:
    """bytes and operations per number of the rows that are made."""
    hidden, wide, dtype, decodes = model.hidden, model.wide, KINDS[kind], rows <= model.decodes[-1]

    def case(name: str, width: int, moved: int, flops: int, make: Callable[[str], Launch]) -> Case:
        def prepare(device: str, turns: int) -> list[Launch]:
            return [make(device) for _ in range(turns)]

        words = f"{name}, {kind}, {rows_of(rows)}"
        return Case("w8a8", model.name, words, rows * (moved * width + 4), flops * rows * width, prepare)

    def norm(device: str, splits: int = 0) -> Launch:
        x = torch.randn(splits, rows, hidden, device=device) if splits else bf16(rows, hidden, device=device)
        residual, weight = bf16(rows, hidden, device=device), bf16(hidden, device=device)
        return lambda: kernel.add_norm(x, residual, weight, EPS, dtype, decodes)

    def gated(device: str) -> Launch:
        gate_up = bf16(rows, 2 * wide, device=device)
        return lambda: kernel.swiglu(gate_up, dtype, decodes)

    def plain(device: str) -> Launch:
        x = bf16(rows, model.query, device=device)
        return lambda: kernel.quantize_rows(x, dtype, decodes)

    yield case("add_norm", hidden, 7, 10, norm)
    if decodes:
        yield case(f"add_norm of {SPLITS} parts", hidden, 4 * SPLITS + 5, 10 + SPLITS, lambda device: norm(device, SPLITS))
    yield case("swiglu", wide, 5, 9, gated)
    yield case("quantize_rows", model.query, 3, 4, plain)
