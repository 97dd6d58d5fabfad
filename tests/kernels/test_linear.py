"""Products of a few rows against float64, of any tiling: on a GPU where there is one, else by Triton's interpreter."""

import os
import random

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from altiplano_kernels.linear import reference  # noqa: E402
from altiplano_kernels.linear.kernel import (  # noqa: E402
    PARTS,
    Tiling,
    choose_tiling,
    fits,
    linear,
    linear_parts,
    swiglu_linear,
)

from .interpreted import patch_kernels, patch_rounding  # noqa: E402

LLAMA = ((3072, 2048), (5120, 3072), (2048, 2048), (3072, 3072), (2048, 8192), (3072, 8192))


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        patch_kernels(monkeypatch)
        patch_rounding(monkeypatch)


def bf16(*shape: int, spread: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * spread).bfloat16().to(DEVICE)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def random_tiling(dice: random.Random) -> Tiling:
    sides = (16, 32, 64)
    return Tiling(dice.choice(sides), dice.choice(sides), dice.choice(sides), dice.choice((1, 2, 3)), 2, 4, dice.random() < 0.5)


@pytest.mark.parametrize("seed", range(8))
def test_a_product_is_that_of_float64(seed: int) -> None:
    dice = random.Random(seed)
    torch.manual_seed(seed)
    tiling = random_tiling(dice)
    n, k = tiling.columns * dice.randint(1, 3), tiling.depth * tiling.splits * dice.randint(1, 3)
    rows = dice.choice((1, tiling.rows - 1, tiling.rows, tiling.rows + 1, 2 * tiling.rows + 3))
    assert fits(tiling, n, k)
    x, w = bf16(rows, k + 16)[:, :k], bf16(n, k, spread=0.1)  # rows are a part of something wider
    wanted = reference.linear(x, w)
    parts = linear_parts(x, w, tiling)
    assert parts.shape == (tiling.splits, rows, n) and parts.dtype is torch.float32
    assert error(parts.double().sum(0), wanted) < 1e-6
    # Each part is the sum of its own share of k.
    share = k // tiling.splits
    for part in range(tiling.splits):
        of = slice(part * share, (part + 1) * share)
        assert error(parts[part], reference.linear(x[:, of], w[:, of])) < 1e-6
    whole = linear(x, w, tiling)
    assert whole.dtype is torch.bfloat16 and error(whole, wanted) < 3e-3


@pytest.mark.parametrize("seed", range(4))
def test_gate_and_up_meet_in_one_kernel(seed: int) -> None:
    dice = random.Random(10 + seed)
    torch.manual_seed(seed)
    tiling = random_tiling(dice)
    n, k = tiling.columns * dice.randint(1, 3), tiling.depth * dice.randint(1, 4)
    rows = dice.choice((1, tiling.rows, tiling.rows + 5))
    x, gate_up = bf16(rows, k + 16)[:, :k], bf16(2 * n, k, spread=0.1)
    assert error(swiglu_linear(x, gate_up, tiling), reference.swiglu_linear(x, gate_up)) < 3e-3


def test_the_chosen_tilings_divide_llamas_weights() -> None:
    for n, k in LLAMA:
        assert fits(choose_tiling(n, k), n, k)
    for hidden in (2048, 3072):
        assert fits(choose_tiling(16384, hidden, gated=True), 8192, hidden)
    assert not fits(PARTS, 100, 512) and not fits(PARTS, 128, 500)
