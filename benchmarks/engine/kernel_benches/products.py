"""Products of bf16 rows and weights: the library's, for comparison, and those of our own for some rows and for any number of them."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

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


def steady_linear(model: Model) -> Iterator[Case]:
    """What the deterministic mode multiplies with."""
    for name, rows in (
        *(("gate_up", rows) for rows in (1, *model.decodes, model.tokens)),
        ("down", 1),
        ("down", model.decodes[0]),
        ("head", 1),
    ):
        yield product_case("steady_linear", model, name, rows, steady)
