"""Updates of many adapters in one batch against float64: on a GPU where there is one, else by Triton's interpreter."""

import os
import random

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from altiplano_kernels.multi_lora import reference  # noqa: E402
from altiplano_kernels.multi_lora.kernel import (  # noqa: E402
    DECODE,
    HEADER,
    PREFILL,
    Shape,
    add_adapters,
    list_tiles,
    most_tiles,
)

POOL_RANK = 32
RANKS = [8, 32, 1, 17]


def bf16(*shape: int, spread: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * spread).bfloat16().to(DEVICE)


def pool(k: int, bounds: tuple[int, ...], tuned_norms: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights of all adapters; what lies behind an adapter's rank is poison."""
    down, up = bf16(len(RANKS), len(bounds) * POOL_RANK, k, spread=0.1), bf16(len(RANKS), bounds[-1], POOL_RANK, spread=0.2)
    for adapter, rank in enumerate(RANKS):
        for module in range(len(bounds)):
            down[adapter, module * POOL_RANK + rank : (module + 1) * POOL_RANK] = float("nan")
        up[adapter, :, rank:] = float("nan")
    gain = 1 + bf16(len(RANKS), bounds[-1], spread=0.3) if tuned_norms else torch.ones_like(up[:, :, 0])
    return down, up, gain


def check(
    owners: list[int],
    k: int,
    bounds: tuple[int, ...],
    shape: Shape,
    tuned_norms: bool,
    spare: int = 0,
    kind: torch.dtype = torch.bfloat16,
) -> None:
    # As a slice of something wider.
    x, out = bf16(len(owners), k), torch.randn(len(owners), bounds[-1] + 16).to(kind).to(DEVICE)[:, : bounds[-1]]
    weights = pool(k, bounds, tuned_norms)
    wanted, before = out.double(), out.clone()
    reference.add_adapters(wanted, x.double(), *(w.double() for w in weights), bounds, owners, RANKS)
    tiles = list_tiles(owners, RANKS, shape, most_tiles(len(owners), len(RANKS), shape) + spare)
    add_adapters(out, x, *weights, bounds, torch.tensor(tiles, dtype=torch.int32, device=DEVICE), shape)
    none = torch.tensor(owners, device=DEVICE) == 0
    assert out[none].equal(before[none]), "rows without an adapter keep every bit"
    error = float((out.double() - wanted).norm() / wanted.norm())
    assert error < 6e-3, error  # the interpreter cuts bf16 off where a GPU rounds


@pytest.mark.parametrize("shape", [DECODE, PREFILL])
@pytest.mark.parametrize(("k", "bounds"), [(96, (64, 96, 128)), (256, (112,)), (512, (128, 256))])
def test_rows_of_any_mix_of_adapters(shape: Shape, k: int, bounds: tuple[int, ...]) -> None:
    torch.manual_seed(k)
    dice = random.Random(k)
    for rows in (1, 9, 40):
        owners = [dice.randrange(len(RANKS) + 1) for _ in range(rows)]
        check(owners, k, bounds, shape, tuned_norms=rows == 9)


def test_one_adapter_for_all_rows_and_none_for_any() -> None:
    torch.manual_seed(0)
    check([2] * 35, 128, (64,), DECODE, tuned_norms=False, spare=3)
    check([0] * 5, 128, (64,), DECODE, tuned_norms=True, spare=1)


def test_float32_sums_take_adapters_too() -> None:
    torch.manual_seed(4)
    check([0, 3, 1, 0, 2, 4, 0], 128, (64, 96), PREFILL, tuned_norms=True, kind=torch.float32)


@pytest.mark.parametrize("shape", [DECODE, PREFILL])
def test_tiles_hold_each_row_of_an_adapter_once_and_fit_into_their_bound(shape: Shape) -> None:
    dice = random.Random(3)
    for _ in range(200):
        owners = [dice.choice([0, 0, 1, 2, 3, 4]) for _ in range(dice.randint(1, 300))]
        bound = most_tiles(len(owners), len(RANKS), shape)
        flat = list_tiles(owners, RANKS, shape, bound)
        width = HEADER + shape.rows
        assert len(flat) == bound * width
        seen: list[tuple[int, int]] = []
        for at in range(0, len(flat), width):
            adapter, count, rank = flat[at : at + HEADER]
            assert adapter == 0 or rank == RANKS[adapter - 1]
            seen += [(row, adapter) for row in flat[at + HEADER : at + HEADER + count]]
        assert sorted(seen) == [(row, owner) for row, owner in enumerate(owners) if owner]
