"""The first half of an update by adapters in a step of a few rows: on a GPU where there is one, else by Triton's interpreter."""

import os
import random

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from altiplano_kernels.few_rows.shrink import SPAN, LowRank, shrink, splits_of  # noqa: E402
from altiplano_kernels.multi_lora.kernel import DECODE, list_tiles, most_tiles  # noqa: E402

RANKS = [8, 32, 1, 17]
POOL_RANK, ROWS, UNTOUCHED = 32, 16, 12345.0


def bf16(*shape: int, spread: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * spread).bfloat16().to(DEVICE)


def check(owners: list[int], k: int, modules: int, normed: bool, spare: int = 0) -> None:
    """Sums of all rows' own adapters against float64; `spare` tiles have no adapter, and no sum but those asked for is written."""
    wide, rows = modules * POOL_RANK, len(owners)
    x, down = bf16(rows, k + 16)[:, :k], bf16(len(RANKS), wide, k, spread=0.1)
    for adapter, rank in enumerate(RANKS):
        for module in range(modules):
            # Zeros behind the rank as the pool has them, and poison where nothing may be read.
            down[adapter, module * POOL_RANK + rank : (module + 1) * POOL_RANK] = 0
            down[adapter, module * POOL_RANK + -(-rank // 16) * 16 : (module + 1) * POOL_RANK] = float("nan")
    gamma = 1 + bf16(k, spread=0.2) if normed else torch.ones(k, dtype=torch.bfloat16, device=DEVICE)
    parts = torch.full((splits_of(k), ROWS, wide), UNTOUCHED, device=DEVICE)
    pairs = [(owner, RANKS[owner - 1] if owner else 0) for owner in owners]
    up, gain = bf16(len(RANKS), 16, POOL_RANK), bf16(len(RANKS), 16)
    low = LowRank(torch.tensor(pairs, dtype=torch.int32, device=DEVICE), parts, up, gain, (16,) * modules)
    tiles = list_tiles(owners, RANKS, DECODE, most_tiles(rows, len(RANKS), DECODE) + spare)
    shrink(x, down, low, torch.tensor(tiles, dtype=torch.int32, device=DEVICE), gamma)
    found = parts.sum(0).view(ROWS, modules, POOL_RANK)
    for row in range(ROWS):
        owner, rank = pairs[row] if row < rows else (0, 0)
        written = -(-rank // 16) * 16
        assert bool((parts.view(-1, ROWS, modules, POOL_RANK)[:, row, :, written:] == UNTOUCHED).all())
        if not owner:
            continue
        wanted = (down[owner - 1].double() @ (x[row].double() * gamma.double())).view(modules, POOL_RANK)[:, :written]
        error = float((found[row, :, :written].double() - wanted).norm() / wanted.norm())
        assert error < 1e-2, (row, owner, error)  # the interpreter cuts bf16 off where a GPU rounds
        assert not found[row, :, rank:written].any(), "behind the rank there are zeros"


@pytest.mark.parametrize(
    ("k", "modules", "normed"), [(256, 3, True), (SPAN + 512, 2, True), (2 * SPAN, 1, False), (96, 1, False)]
)
def test_rows_of_any_mix_of_adapters(k: int, modules: int, normed: bool) -> None:
    torch.manual_seed(k)
    dice = random.Random(k)
    for rows in (1, 7, 16):
        check([dice.randrange(len(RANKS) + 1) for _ in range(rows)], k, modules, normed)


def test_one_adapter_for_all_rows_and_none_for_any() -> None:
    torch.manual_seed(0)
    check([2] * 16, 128, 1, normed=False, spare=3)
    check([0] * 5, 128, 2, normed=True, spare=1)


def test_what_a_row_gets_is_the_same_to_the_bit_whoever_is_beside_it() -> None:
    torch.manual_seed(1)
    k, wide = SPAN + 256, 2 * POOL_RANK
    x, down, gamma = bf16(ROWS, k), bf16(len(RANKS), wide, k, spread=0.1), bf16(k)
    up, gain = bf16(len(RANKS), 16, POOL_RANK), bf16(len(RANKS), 16)

    def sums(row: int, owners: list[int]) -> torch.Tensor:
        """Of the last row, which has the numbers of `row` and adapter 2."""
        given = x.clone()[: len(owners)]
        given[-1] = x[row]
        parts = torch.zeros(splits_of(k), ROWS, wide, device=DEVICE)
        low = LowRank(torch.zeros(ROWS, 2, dtype=torch.int32, device=DEVICE), parts, up, gain, (8, 16))
        tiles = torch.tensor(list_tiles(owners, RANKS, DECODE), dtype=torch.int32, device=DEVICE)
        shrink(given, down, low, tiles, gamma)
        return parts[:, len(owners) - 1]

    alone = sums(3, [2])
    assert alone.any()
    for owners in ([0, 2], [2] * 16, [1, 4, 3, 0, 2, 2, 1, 2]):
        assert sums(3, owners).equal(alone)
