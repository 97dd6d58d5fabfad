"""Products of bf16 rows and weights: the library's, for comparison, and those of our own for some rows and for any number of them."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from altiplano_kernels.steady_linear import kernel as steady
from altiplano_kernels.tile_linear import kernel as tile
from kernel_benches.case import Case, Launch, Model, bf16, copies, each, product_bytes, rows_of

# From rows to what is launched for a weight.
Product = Callable[[torch.Tensor], Callable[[torch.Tensor], object]]


def product_case(kernel: str, model: Model, name: str, rows: int, multiply: Product, moved: int | None = None) -> Case:
    n, k = model.weights[name]

    def prepare(device: str, turns: int) -> list[Launch]:
        launch = multiply(bf16(rows, k, device=device))
        return each(launch, copies(bf16(n, k, device=device, spread=0.02), turns))

    return Case(kernel, model.name, f"{name}, {rows_of(rows)}", moved or product_bytes(rows, n, k), 2 * rows * n * k, prepare)


def gemm(model: Model) -> Iterator[Case]:
    """The library's product, which everything but few rows takes where ours is not faster."""
    counts = {
        "qkv": model.decodes,
        "o": model.decodes,
        "gate_up": (1, 8, *model.decodes, model.tokens),
        "down": (1, 8, *model.decodes, model.tokens),
        "head": (1, *model.decodes),
    }
    for name, batches in counts.items():
        for rows in batches:
            yield product_case("gemm", model, name, rows, lambda x: lambda w: x @ w.T)


def steady_linear(model: Model) -> Iterator[Case]:
    """What the deterministic mode multiplies with, with the activation, in parts, and whole."""
    few, many = (1, *model.decodes), model.tokens
    for name, multiply, counts in (
        ("gate_up", steady.swiglu_linear, (*few, many)),
        ("down", steady.linear_parts, few[:2]),
        ("head", steady.linear, few[:1]),
    ):
        n, k = model.weights[name]
        written = {"gate_up": n, "down": 4 * n * steady.parts_of(n, k), "head": 2 * n}[name]
        for rows in counts:
            moved = 2 * n * k + rows * (2 * k + written)
            yield product_case("steady_linear", model, name, rows, lambda x, multiply=multiply: partial(multiply, x), moved)


def tile_linear(model: Model) -> Iterator[Case]:
    """CUDA C++ for some rows, where it is not left to the library: whole, in parts, with the activation, and with the draw."""
    kinds = {"qkv": tile.WHOLE, "o": tile.PARTS, "gate_up": tile.GATED, "down": tile.PARTS, "head": tile.DRAW}
    for name, kind in kinds.items():
        n, k = model.weights[name]
        for rows in sorted({16, 128, *model.decodes}):
            tiling = tile.choose(rows, torch.empty(n, k, device="meta"), kind)
            if tiling is not None:
                moved = 2 * n * k + 2 * rows * k + rows * tile_bytes(kind, n, tiling)
                yield product_case("tile_linear", model, name, rows, partial(tiled, kind=kind, tiling=tiling), moved)


def tile_bytes(kind: int, n: int, tiling: tile.Tiling) -> int:
    """What is written of one row; of a draw that is next to nothing."""
    sizes = {tile.WHOLE: 2 * n, tile.PARTS: 4 * n * tiling.splits, tile.GATED: n, tile.DRAW: 0}
    return sizes[kind]


def tiled(x: torch.Tensor, kind: int, tiling: tile.Tiling) -> Callable[[torch.Tensor], object]:
    if kind != tile.DRAW:
        multiply = {tile.WHOLE: tile.linear, tile.PARTS: tile.linear_parts, tile.GATED: tile.swiglu_linear}[kind]
        return lambda w: multiply(x, w, tiling)
    rows, device = len(x), x.device
    slots, steps = (torch.arange(rows, dtype=torch.int32, device=device) for _ in range(2))
    seeds, temperatures = torch.arange(rows, device=device), torch.full((rows,), 0.7, device=device)
    return lambda w: tile.linear_draw(x, w, tiling, slots, temperatures, seeds, steps)
