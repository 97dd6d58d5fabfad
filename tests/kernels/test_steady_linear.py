"""Products that are the same in any number of rows: on a GPU where there is one, else by Triton's interpreter."""

import os
from pathlib import Path

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from altiplano_kernels.embed_norm.kernel import add_norm  # noqa: E402
from altiplano_kernels.steady_linear import kernel as steady  # noqa: E402
from altiplano_kernels.steady_linear.kernel import linear  # noqa: E402
from altiplano_kernels.tile_linear import kernel as tile  # noqa: E402
from altiplano_kernels.tile_linear import reference  # noqa: E402
from altiplano_kernels.tile_linear.kernel import GATED, PARTS, WHOLE, Tiling  # noqa: E402

from .interpreted import patch_rounding  # noqa: E402

# The interpreter multiplies bf16 by its bits.
KIND = torch.bfloat16 if DEVICE == "cuda" else torch.float32


@pytest.mark.parametrize(("rows", "n", "k"), [(1, 64, 64), (65, 130, 128), (3, 70, 320)])
def test_the_product_is_that_of_float64(rows: int, n: int, k: int) -> None:
    torch.manual_seed(rows)
    wide = torch.randn(rows, k + 64, device=DEVICE).to(KIND)
    x, w = wide[:, :k], torch.randn(n, k, device=DEVICE).to(KIND)
    wanted = reference.linear(x, w)
    for kind, bound in ((torch.bfloat16, 5e-3), (torch.float32, 1e-5)):
        found = linear(x, w, kind)
        assert found.dtype is kind
        assert float((found.double() - wanted).norm() / wanted.norm()) < bound


def test_a_row_alone_is_the_row_among_others() -> None:
    torch.manual_seed(1)
    x, w = torch.randn(70, 128, device=DEVICE).to(KIND), torch.randn(64, 128, device=DEVICE).to(KIND)
    whole = linear(x, w)
    for first, count in ((0, 1), (69, 1), (5, 16), (3, 66)):
        assert torch.equal(linear(x[first : first + count], w), whole[first : first + count])


def test_sums_that_do_not_divide_are_refused() -> None:
    with pytest.raises(AssertionError, match="do not divide by 64"):
        linear(torch.zeros(1, 70, device=DEVICE).bfloat16(), torch.zeros(8, 70, device=DEVICE).bfloat16())


def test_the_sum_into_the_residual_is_that_of_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, whether parts of all rows are in memory at once or not: adapters add to the product where others have none."""
    patch_rounding(monkeypatch)
    torch.manual_seed(2)
    rows, n, k = 21, 64, 128
    x, w = torch.randn(rows, k, device=DEVICE).to(KIND), torch.randn(n, k, device=DEVICE).to(KIND)
    before, weight = torch.randn(rows, n, device=DEVICE).bfloat16(), torch.randn(n, device=DEVICE).bfloat16()
    product = steady.add(steady.linear_parts(x, w))
    assert torch.equal(product, linear(x, w)), "there is one part"
    residual, wanted = before.clone(), torch.empty_like(before)
    add_norm(product, residual, weight, wanted, 1e-5)
    for most in (2048, 8):
        monkeypatch.setattr(steady, "MOST_ROWS", most)
        found, out = before.clone(), torch.empty_like(before)
        steady.add_norm_linear(x, w, found, weight, out, 1e-5)
        assert torch.equal(found, residual) and torch.equal(out, wanted)


def test_where_there_are_no_tiles_the_activation_has_a_kernel_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a row that no adapter adds to is the same whether or not the step has adapters."""
    patch_rounding(monkeypatch)
    torch.manual_seed(3)
    x, gate_up = (torch.randn(*shape, device=DEVICE).to(KIND) for shape in ((5, 128), (2 * 36, 128)))
    x, sums = x * 0.1, steady.swiglu_sums(x * 0.1, gate_up)
    assert sums.shape == (5, 72) and sums.dtype is torch.bfloat16
    found, wanted = steady.activate(sums), reference.swiglu_linear(x, gate_up)
    assert float((found.double() - wanted).norm() / wanted.norm()) < 1e-2
    assert torch.equal(found, steady.swiglu_linear(x, gate_up))


def test_parts_are_added_in_their_order() -> None:
    parts = torch.tensor([2.0**60, -(2.0**60), 1.0, 2.0**-8 + 2.0**-20]).reshape(4, 1, 1)
    # Exact: 1 + 2**-8 + 2**-20, rounded once, upwards.
    assert steady.add(parts).tolist() == [[1 + 2**-7]]
    assert steady.add(parts[[2, 0, 1, 3]]).item() == pytest.approx(2**-8, rel=1e-2), "another order loses the one"


# [n, k] of what is left in parts, and of what is not, in Llama 3.2 1B and 3B.
PARTED = {(2048, 2048): 2, (2048, 8192): 4, (3072, 3072): 2, (3072, 8192): 2}
UNDIVIDED = [(3072, 2048), (5120, 3072), (16384, 2048), (128256, 3072)]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steady, "runs_on", lambda device: True)


def test_tiles_may_depend_on_the_rows_and_parts_may_not(hopper: None) -> None:
    assert {shape: steady.parts_of(*shape) for shape in PARTED} == PARTED
    for (n, k), parts in (PARTED | dict.fromkeys(UNDIVIDED, 1)).items():
        weight = torch.empty(n, k, device="meta")
        for rows in (1, 16, 64, 65, 128, 129, 256, 257, 8192):
            tiling = steady.choose(rows, weight, parts)
            assert tiling is not None and tiling.splits == parts and tile.fits(tiling, n, k)
            assert rows > 128 or tiling.rows >= rows, "a weight is read once"
    for n, k in ((2048, 192), (1000, 512), (4096, 576)):  # in Triton, for any number of rows
        assert {steady.choose(rows, torch.empty(n, k, device="meta")) for rows in (1, 64, 8192)} == {None}


def test_ahead_of_the_steps_all_that_they_will_need_is_compiled(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made = set[tuple[Tiling, int]]()
    activations = list[Path]()
    monkeypatch.setattr(tile, "compile_tiling", lambda tiling, kind: made.add((tiling, kind)))
    monkeypatch.setattr(steady, "compile_source", lambda source, *_: activations.append(source))
    shapes = (3072, 2048), (128256, 2048), (2048, 2048), (2048, 8192), (16384, 2048), (1000, 512)
    qkv, head, o, down, gate_up, odd = (torch.empty(n, k, device="meta") for n, k in shapes)
    steady.compile_tilings([qkv, head, odd], [o, down], [gate_up], lambda: True)
    sizes = (1, 64, 65, 128, 129, 1024, 1025, 8192)
    wanted = {(steady.choose(rows, w), WHOLE) for rows in sizes for w in (qkv, head)}
    wanted |= {(steady.choose(rows, w, steady.parts_of(*w.shape)), PARTS) for rows in sizes for w in (o, down)}
    wanted |= {(steady.choose(rows, gate_up), GATED) for rows in sizes}
    # Log-probabilities and adapters take float32 sums.
    wanted |= {(steady.choose(rows, w), PARTS) for rows in sizes for w in (qkv, head, gate_up)}
    assert made == wanted and activations == [steady.GATED]
    made.clear()
    steady.compile_tilings([qkv, head], [o, down], [gate_up], lambda: len(made) < 2)
    assert len(made) == 2
