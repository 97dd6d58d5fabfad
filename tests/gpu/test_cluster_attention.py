"""Decode attention by clusters of blocks against float64, over random shapes, ragged lengths, page edges and poisoned free pages."""

import random

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA C++ has no interpreter"),
]

from altiplano_kernels.cluster_attention.kernel import Shape, choose_shape, decode_clusters, fits  # noqa: E402

from ..kernels.paged import KINDS, LastRows, Pages, Sizes, random_lengths  # noqa: E402

BOUND = {
    torch.bfloat16: 8e-3,
    torch.int8: 3e-3,
    torch.float8_e4m3fn: 3e-3,
}  # codes of 8 bits are multiplied in float16, weights too


def random_sizes(dice: random.Random) -> Sizes:
    return Sizes(dice.randint(1, 8), dice.randint(1, 8), dice.choice((64, 128)), dice.choice((16, 32, 64)))


def check(pages: Pages, slots: list[int], shape: Shape | None, pdl: bool = False) -> None:
    last, heads = LastRows(pages, slots), pages.sizes.heads
    last.ask()
    decode_clusters(last.query, pages.cache, pages.scales, pages.tables, last.rows, last.positions, last.out, heads, shape, pdl)
    errors = last.errors()
    worst = slots[int(errors.argmax())]
    assert float(errors.max()) < BOUND[pages.cache.dtype], (pages.sizes, shape, pages.lengths[worst])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_random_shapes(kind: torch.dtype, seed: int) -> None:
    dice = random.Random(seed)
    torch.manual_seed(seed)
    sizes = random_sizes(dice)
    assert fits(sizes.heads, sizes.kv_heads, sizes.dim, sizes.page)
    shape = Shape((1, 2, 4, 8, 16, 1)[seed], dice.choice((1, 2)), dice.choice((1, 2, 4, 8)))
    lengths = [*random_lengths(dice, sizes.page, 20), dice.randint(300, 700), 16 * shape.cluster * shape.warps + 1]
    pages = Pages(sizes, lengths, kind, dice, "cuda")
    # Rows in any order, of not all slots, and the long ones among them.
    check(pages, [*dice.sample(range(20), dice.randint(1, 19)), 20, 21], shape)


@pytest.mark.parametrize("rows", [1, 8, 9, 32, 33, 130])
@pytest.mark.parametrize("sizes", [Sizes(8, 4, 64, 32), Sizes(8, 3, 128, 32)], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_shapes_that_are_chosen_for_llama(kind: torch.dtype, sizes: Sizes, rows: int) -> None:
    dice = random.Random(rows)
    torch.manual_seed(rows)
    pages = Pages(sizes, [*random_lengths(dice, sizes.page, rows - 1), dice.randint(1, 1500)], kind, dice, "cuda")
    check(pages, dice.sample(range(rows), rows), None, pdl=True)


def test_few_programs_get_clusters_and_many_get_none() -> None:
    assert choose_shape(1, 8, 64, 2).cluster == 8 and choose_shape(256, 8, 64, 2).cluster == 1
    for dim in (64, 128):
        for itemsize in (1, 2):
            clusters = [choose_shape(rows, 8, dim, itemsize).cluster for rows in range(1, 300)]
            assert clusters == sorted(clusters, reverse=True) and all(4 * dim % cluster == 0 for cluster in clusters)
