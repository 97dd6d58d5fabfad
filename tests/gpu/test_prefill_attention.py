"""Attention of prompt chunks in CUDA C++ against float64: chunks that begin anywhere, edges of pages, poison where no token is."""

import random
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")
from altiplano_kernels.prefill_attention import groups
from altiplano_kernels.prefill_attention.groups import choose, prefill_groups
from altiplano_kernels.prefill_attention.kernel import list_tiles

from ..kernels.paged import BOUND, KINDS, Pages, Sizes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9), reason="needs wgmma"),
]
LLAMAS = {"1b": Sizes(8, 4, 64, 32), "3b": Sizes(8, 3, 128, 32)}
OTHERS = [
    Sizes(2, 2, 64, 128),
    Sizes(3, 3, 64, 32),
    Sizes(2, 4, 64, 192),
    Sizes(3, 1, 64, 8),
    Sizes(1, 8, 128, 16),
    Sizes(2, 6, 64, 64),
]


class Case(NamedTuple):
    pages: Pages
    chunks: list[tuple[int, int, int, int]]
    query: torch.Tensor  # bf16, beside numbers that nobody may read

    def run(self, rows: int = groups.ROWS, supposed: int = 0) -> torch.Tensor:
        """[tokens, heads * head_dim]; chunks are cut into tiles of `rows`. `supposed`: how many tiles the shape is chosen for, if not for these."""
        tiles = torch.tensor(list_tiles(self.chunks, rows), dtype=torch.int32, device="cuda")
        pages, width = self.pages, self.pages.sizes.heads * self.pages.sizes.dim
        sizes, coded = pages.sizes, pages.scales is not None
        shape = choose(supposed, sizes.heads, sizes.kv_heads, sizes.dim, sizes.page, coded, 132) if supposed else None
        wide = torch.full((len(self.query), width + 8), float("nan"), dtype=torch.bfloat16, device="cuda")
        prefill_groups(self.query, pages.cache, pages.scales, pages.tables, tiles, wide[:, :width], sizes.heads, shape)
        assert bool(wide[:, width:].isnan().all()), "something was written beside the rows"
        return wide[:, :width]

    def error(self, out: torch.Tensor) -> float:
        """The largest of a chunk."""
        of = [(slice(begin, begin + count), slot, start) for begin, count, start, slot in self.chunks]
        return max(self.pages.error(self.query[rows], out[rows], slot, start) for rows, slot, start in of)


def make(sizes: Sizes, kind: torch.dtype, seed: int) -> Case:
    """Five sequences, of which the last chunks begin at zero, in a page, at its edge, or at the last token."""
    dice = random.Random(seed)
    torch.manual_seed(seed)
    page = sizes.page
    edges = (1, page - 1, page, page + 1, 63, 64, 65, 127, 128, 129)
    lengths = [dice.choice(edges), dice.choice(edges), dice.randint(1, 400), dice.randint(200, 600), 64 * dice.randint(1, 4)]
    pages = Pages(sizes, lengths, kind, dice, "cuda")
    chunks, first = list[tuple[int, int, int, int]](), 0
    for slot in dice.sample(range(5), 5):
        n = lengths[slot]
        start = dice.choice((0, dice.randrange(n), min(page, n - 1), n - 1))
        chunks.append((first, n - start, start, slot))
        first += n - start
    width = sizes.heads * sizes.dim
    query = torch.full((first, width + 64), float("nan"), dtype=torch.bfloat16, device="cuda")[:, :width]
    query.copy_(torch.randn(first, width))
    return Case(pages, chunks, query)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("sizes", [*LLAMAS.values(), *OTHERS], ids=str)
def test_chunks_see_what_was_cached_before_them_and_no_later_token(sizes: Sizes, kind: torch.dtype, seed: int) -> None:
    case = make(sizes, kind, seed)
    assert case.error(case.run()) < BOUND, case.chunks


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("sizes", LLAMAS.values(), ids=LLAMAS)
def test_shapes_for_few_tiles_and_for_many_are_as_exact(sizes: Sizes, kind: torch.dtype) -> None:
    case = make(sizes, kind, 5)
    for tiles in (1, 1000):
        assert case.error(case.run(supposed=tiles)) < BOUND, (tiles, case.chunks)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("sizes", LLAMAS.values(), ids=LLAMAS)
def test_a_token_is_the_same_to_the_bit_in_whichever_tile_it_is(sizes: Sizes, kind: torch.dtype) -> None:
    case = make(sizes, kind, 7)
    wanted = case.run(supposed=1000)
    for rows in (1, 37, 64):
        assert torch.equal(case.run(rows, supposed=1000), wanted), rows


@pytest.mark.parametrize("sizes", LLAMAS.values(), ids=LLAMAS)
def test_many_tiles_take_turns_at_the_blocks(sizes: Sizes) -> None:
    """More tiles than processors, of many lengths, so that rings and queries are used again."""
    case = make(sizes, torch.bfloat16, 9)
    out = case.run(rows=5)
    assert case.error(out) < BOUND and torch.equal(out, case.run(rows=5))
