"""Products that are the same in any number of rows: on a GPU where there is one, else by Triton's interpreter."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from altiplano_kernels.steady_linear.kernel import linear  # noqa: E402
from altiplano_kernels.tile_linear import reference  # noqa: E402

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
