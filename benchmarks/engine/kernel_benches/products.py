"""Products of bf16 rows and weights: the library's, for comparison, and those of our own for some rows and for any number of them."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from altiplano_kernels.linear import kernel as linear_kernel
from altiplano_kernels.steady_linear.kernel import linear as steady
from kernel_benches.case import Case, Launch, Model, bf16, copies, each, product_bytes, rows_of

Product = Callable[[torch.Tensor, torch.Tensor], object]


def product_case(kernel: str, model: Model, name: str, rows: int, multiply: Product, moved: int | None = None) -> Case:
    n, k = (model.vocab, model.hidden) if name == "head" else model.products[name]

    def prepare(device: str, turns: int) -> list[Launch]:
        x = bf16(rows, k, device=device)
        return each(partial(multiply, x), copies(bf16(n, k, device=device, spread=0.02), turns))

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
            yield product_case("gemm", model, name, rows, lambda x, w: x @ w.T)


def linear(model: Model) -> Iterator[Case]:
    """Parts of sums, and gate and up with their activation: up to 64 rows."""
    for rows in (linear_kernel.MOST_ROWS // 2, linear_kernel.MOST_ROWS):
        for name in ("o", "down"):
            n, k = model.products[name]
            tiling = linear_kernel.choose_tiling(n, k)
            moved = 2 * n * k + rows * (2 * k + 4 * n * tiling.splits)
            yield product_case("linear", model, name, rows, partial(linear_kernel.linear_parts, tiling=tiling, pdl=True), moved)
        tiling = linear_kernel.choose_tiling(*model.products["qkv"])
        yield product_case("linear", model, "qkv", rows, partial(linear_kernel.linear, tiling=tiling, pdl=True))
        tiling = linear_kernel.choose_tiling(*model.products["gate_up"], gated=True)
        moved = 2 * 2 * model.wide * model.hidden + 2 * rows * (model.hidden + model.wide)
        yield product_case("linear", model, "gate_up", rows, partial(linear_kernel.swiglu_linear, tiling=tiling, pdl=True), moved)


def steady_linear(model: Model) -> Iterator[Case]:
    """What the deterministic mode multiplies with."""
    for name, rows in (
        *(("gate_up", rows) for rows in (1, *model.decodes, model.tokens)),
        ("down", 1),
        ("down", model.decodes[0]),
        ("head", 1),
    ):
        yield product_case("steady_linear", model, name, rows, steady)
