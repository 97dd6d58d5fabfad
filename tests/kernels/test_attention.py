"""Paged attention against float64 over random shapes, ragged lengths and page edges: on a GPU where there is one, else by Triton's interpreter."""

import os
import random

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from altiplano_kernels.paged_attention.kernel import DecodeWorkspace, decode  # noqa: E402
from altiplano_kernels.prefill_attention.kernel import list_tiles, prefill_triton  # noqa: E402

from .interpreted import patch_rounding  # noqa: E402
from .paged import (  # noqa: E402
    BOUND,
    KINDS,
    QUERY,
    LastRows,
    Pages,
    Sizes,
    chosen_for_many_rows,
    random_lengths,
    random_sizes,
    wider,
)

# Heads of a group, their size, splits, and tile, stages and warps.
CHOSEN = sorted((heads // kv_heads, dim, splits, tiling) for (heads, kv_heads, dim), splits, tiling in chosen_for_many_rows())


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_rounding(monkeypatch)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_one_token_sees_all_before_it_and_nothing_else(kind: torch.dtype, seed: int) -> None:
    dice = random.Random(seed)
    torch.manual_seed(seed)
    sizes = random_sizes(dice)
    # Rows are in any order, and not all slots have one; the first has something for each split.
    pages = Pages(sizes, [*random_lengths(dice, sizes.page, 4), 9 * sizes.page - 3], kind, dice, DEVICE)
    slots = [4, *dice.sample(range(4), 3)]
    last = LastRows(pages, slots, QUERY)
    splits, tile = (1, 2, 3, 8)[seed % 4], dice.choice((16, 32, 64))
    work = DecodeWorkspace(4, sizes.kv_heads, sizes.dim, DEVICE, splits)
    given = pages.cache, pages.scales, pages.tables, last.rows, last.positions, last.out, work
    for _ in range(2):  # whoever comes last adds the parts up, the second time too
        last.ask()
        decode(last.query, *given, sizes.heads, splits, tile, 2, 4)
        assert float(last.errors().max()) < BOUND, (sizes, pages.lengths, splits, tile)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("group", "dim", "splits", "tiling"), CHOSEN, ids=str)
def test_choices_for_many_rows_see_the_same(
    group: int, dim: int, splits: int, tiling: tuple[int, int, int], kind: torch.dtype
) -> None:
    """At few rows and heads: the end of a tile, of a page, and more than one tile a split."""
    torch.manual_seed(splits + dim)
    pages = Pages(Sizes(2, group, dim, 32), [1, 33, 64, 65, 4 * 64 + 90], kind, random.Random(dim), DEVICE)
    last = LastRows(pages, [4, 2, 0, 3, 1], QUERY)
    work = DecodeWorkspace(5, 2, dim, DEVICE, splits)
    last.ask()
    decode(
        last.query, pages.cache, pages.scales, pages.tables, last.rows, last.positions, last.out, work, 2 * group, splits, *tiling
    )
    assert float(last.errors().max()) < BOUND
    assert int(work.counters.abs().max()) == 0


def test_both_tilings_are_chosen() -> None:
    assert {(splits, *tiling) for _, _, splits, tiling in CHOSEN} == {(1, 32, 4, 1), (1, 64, 3, 2), (4, 32, 4, 1), (4, 64, 3, 2)}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_chunks_see_what_was_cached_before_them_and_no_later_token(kind: torch.dtype, seed: int) -> None:
    dice = random.Random(100 + seed)
    torch.manual_seed(seed)
    sizes = random_sizes(dice)
    pages = Pages(sizes, random_lengths(dice, sizes.page, 4), kind, dice, DEVICE)
    chunks, first = list[tuple[int, int, int, int]](), 0
    for slot in dice.sample(range(4), 3):
        start = dice.choice((0, dice.randrange(pages.lengths[slot]), min(sizes.page, pages.lengths[slot] - 1)))
        chunks.append((first, pages.lengths[slot] - start, start, slot))
        first += pages.lengths[slot] - start
    width, rows, tile = sizes.heads * sizes.dim, dice.choice((16, 32)), dice.choice((16, 32))
    query, out = (wider(first, width, dtype, DEVICE) for dtype in (QUERY, torch.bfloat16))
    query.copy_(torch.randn(first, width).bfloat16())
    tiles = torch.tensor(list_tiles(chunks, rows), dtype=torch.int32, device=DEVICE)
    out.fill_(float("nan"))
    prefill_triton(query, pages.cache, pages.scales, pages.tables, tiles, out, sizes.heads, rows, tile, 2, 4)
    for begin, count, start, slot in chunks:
        of = slice(begin, begin + count)
        assert pages.error(query[of], out[of], slot, start) < BOUND, (sizes, start, count, rows, tile)


def test_tiles_hold_each_token_of_each_chunk_once_and_the_longest_first() -> None:
    dice = random.Random(4)
    for _ in range(50):
        chunks, first = list[tuple[int, int, int, int]](), 0
        for slot in range(dice.randint(1, 6)):
            tokens = dice.randint(1, 200)
            chunks.append((first, tokens, dice.randint(0, 99), slot))
            first += tokens
        rows = dice.choice((16, 64, 128))
        flat = list_tiles(chunks, rows)
        tiles = [tuple(flat[at : at + 4]) for at in range(0, len(flat), 4)]
        wanted = {begin + i: (start + i, slot) for begin, tokens, start, slot in chunks for i in range(tokens)}
        found = {begin + i: (position + i, slot) for begin, count, position, slot in tiles for i in range(count)}
        assert found == wanted and sum(tile[1] for tile in tiles) == first and max(tile[1] for tile in tiles) <= rows
        assert [tile[2] for tile in tiles] == sorted((tile[2] for tile in tiles), reverse=True)
