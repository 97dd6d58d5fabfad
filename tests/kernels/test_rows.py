"""Norms and the gated activation of random rows against float64: on a GPU where there is one, else by Triton's interpreter."""

import os
import random

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from altiplano_kernels.embed_norm import reference  # noqa: E402
from altiplano_kernels.embed_norm.kernel import add_norm, add_norm_parts, embed_rows  # noqa: E402
from altiplano_kernels.swiglu.kernel import swiglu  # noqa: E402
from altiplano_kernels.swiglu.reference import swiglu as swiglu_of  # noqa: E402

from .interpreted import patch_rounding  # noqa: E402

EPS = 1e-5
HALF = 2**-8  # a step of bf16
WIDTHS = (16, 80, 256, 1000, 2048, 3072)  # of rows: powers of two, and what is padded to one


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_rounding(monkeypatch)


def bf16(*shape: int, spread: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * spread).bfloat16().to(DEVICE)


def check(found: torch.Tensor, wanted: torch.Tensor, roundings: int) -> None:
    """Each number is within so many roundings of bf16, one after the other."""
    off, exact = (found.double() - wanted).abs(), wanted.abs()
    assert bool((off <= roundings * HALF * 1.02 * exact + 1e-6).all()), float((off / exact.clamp(min=1e-3)).max())


@pytest.mark.parametrize("hidden", WIDTHS)
def test_tokens_of_slots_become_normed_rows(hidden: int) -> None:
    dice = random.Random(hidden)
    torch.manual_seed(hidden)
    slots, rows, vocab = 9, dice.randint(1, 7), 50
    tokens, positions = (torch.randint(high, (slots,), dtype=torch.int32, device=DEVICE) for high in (vocab, 1000))
    pick = torch.tensor([dice.randrange(slots) for _ in range(rows)], dtype=torch.int32, device=DEVICE)
    table, weight = bf16(vocab, hidden, spread=dice.choice((0.02, 1.0, 300.0))), 1 + bf16(hidden, spread=0.3)
    residual, out = (torch.full((rows, hidden), float("nan"), dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    at = torch.full((rows,), -1, dtype=torch.int32, device=DEVICE)
    embed_rows(tokens, positions, pick, table, weight, residual, out, at, EPS)
    wanted = reference.embed_rows(tokens, positions, pick, table.double(), weight.double(), EPS)
    assert torch.equal(residual.double(), wanted[0]) and torch.equal(at, wanted[2])
    check(out, wanted[1], roundings=2)


@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("hidden", WIDTHS)
def test_a_sum_is_kept_and_its_norm_goes_on(hidden: int, splits: int) -> None:
    """Of parts in float32, or of one in bf16, whose place the norm takes."""
    dice = random.Random(hidden + splits)
    torch.manual_seed(hidden + splits)
    rows = dice.randint(1, 6)
    residual, weight = bf16(rows, hidden, spread=dice.choice((0.1, 4.0))), 1 + bf16(hidden, spread=0.3)
    parts = torch.randn(splits, rows, hidden, device=DEVICE) if splits > 1 else bf16(1, rows, hidden)
    # A sum of parts is rounded as a product would be, before the residual is added.
    added = parts.double().sum(0).float().bfloat16().double()
    normed, total = reference.add_norm_parts(added[None], residual.double(), weight.double(), EPS)
    if splits > 1:
        out = torch.full_like(residual, float("nan"))
        add_norm_parts(parts, residual, weight, out, EPS)
    else:
        out = parts[0]
        add_norm(out, residual, weight, out, EPS)
    # Where float32 and float64 round the parts to different neighbours, the sum is off by a step of those.
    slack = (total.abs() + added.abs()) * 2**-7 * 1.02 + 1e-6 if splits > 1 else total.abs() * HALF * 1.02 + 1e-6
    assert bool(((residual.double() - total).abs() <= slack).all())
    # The norm is of the sum as it is kept.
    kept, _ = reference.add_norm_parts(residual.double()[None], torch.zeros_like(normed), weight.double(), EPS)
    check(out, kept, roundings=2)
    assert float((out.double() - normed).norm() / normed.norm()) < 6e-3


def test_a_row_of_zeros_stays_finite() -> None:
    residual, weight = torch.zeros(2, 64, dtype=torch.bfloat16, device=DEVICE), bf16(64)
    x = torch.zeros_like(residual)
    add_norm(x, residual, weight, x, EPS)
    assert x.abs().max() == 0


@pytest.mark.parametrize("wide", [1, 100, 2048, 2049, 8192])
def test_gates_of_rows(wide: int) -> None:
    torch.manual_seed(wide)
    gate_up = bf16(3, 2 * wide, spread=3.0)
    gate_up[0, 0], gate_up[1, 0] = 60.0, -60.0  # far out, where exp alone would overflow
    out = torch.full((3, wide), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    assert swiglu(gate_up, out) is out
    check(out, swiglu_of(gate_up.double()), roundings=2)
