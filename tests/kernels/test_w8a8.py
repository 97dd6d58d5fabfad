"""8-bit rows and products against torch and float64: on a GPU where there is one, else by Triton's interpreter."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from altiplano_kernels.rms_norm.reference import add_rms_norm  # noqa: E402
from altiplano_kernels.swiglu.reference import swiglu as swiglu_of  # noqa: E402
from altiplano_kernels.w8a8 import kernel, reference  # noqa: E402

KINDS = [torch.int8, torch.float8_e4m3fn]
# Half a step of a code, as a share of the row's largest value; and roundings of bf16 before it, which the interpreter cuts off.
STEP = {torch.int8: 0.5 / 127, torch.float8_e4m3fn: 2**-4}
BEFORE = 2**-7 if DEVICE == "cuda" else 3 * 2**-7


def bf16(*shape: int, spread: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * spread).bfloat16().to(DEVICE)


def values(codes: kernel.Codes) -> torch.Tensor:
    return codes.values.double() * codes.scales.double()[:, None]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_quantized_as_by_the_reference(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    x = bf16(7, 333, spread=3.0)
    x[2] = 0
    x[3, 5] = 1000.0
    x[4] *= 1e-20
    found = kernel.quantize_rows(x, kind)
    codes, scales = reference.quantize_rows(x, kind)
    assert found.scales.equal(scales)
    assert found.values.float().equal(codes.float())
    assert values(found)[2].abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden", [64, 200])
def test_norm_and_swiglu_leave_codes_of_what_they_compute(kind: torch.dtype, hidden: int) -> None:
    torch.manual_seed(hidden)
    x, residual, weight = bf16(5, hidden), bf16(5, hidden, spread=4.0), 1 + bf16(hidden, spread=0.2)
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    found = kernel.add_norm(x, residual, weight, 1e-5, kind)
    assert float((residual.double() - total.double()).abs().max() / total.double().abs().max()) < 2**-7
    gate_up = bf16(5, 2 * hidden, spread=2.0)
    for codes, wanted in ((found, normed.double()), (kernel.swiglu(gate_up, kind), swiglu_of(gate_up).double())):
        largest = wanted.abs().amax(-1, keepdim=True)
        assert bool(((values(codes) - wanted).abs() <= (STEP[kind] + BEFORE) * largest).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tiling", [kernel.Tiling(16, 32, 64, 2, 4), kernel.Tiling(32, 64, 128, 2, 4)])
def test_products_of_codes(kind: torch.dtype, tiling: kernel.Tiling) -> None:
    torch.manual_seed(1)
    for rows, n, k in ((1, 48, 96), (9, 64, 128), (40, 80, 200)):
        x = kernel.Codes(*reference.quantize_rows(bf16(rows, k), kind))
        w = kernel.Codes(*reference.quantize_rows(bf16(n, k, spread=0.05), kind))
        found, wanted = kernel.linear(x, w, tiling), reference.linear(*x, *w)
        error = float((found.double() - wanted).norm() / wanted.norm())
        assert error < 4e-3, (rows, n, k, error)  # the interpreter cuts bf16 off where a GPU rounds


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_products_are_close_to_bf16(kind: torch.dtype) -> None:
    """The error of W8A8 itself: about 1 % for INT8 and 4 % for FP8 on normal values."""
    torch.manual_seed(2)
    x, w = bf16(17, 256), bf16(96, 256, spread=0.05)
    weight = kernel.Codes(*reference.quantize_rows(w, kind))
    found = kernel.linear(kernel.quantize_rows(x, kind), weight, kernel.Tiling(32, 32, 128, 2, 4)).double()
    wanted = x.double() @ w.double().T
    assert float((found - wanted).norm() / wanted.norm()) < (0.015 if kind is torch.int8 else 0.06)


def test_the_choice_of_tiles_fits_all_batches() -> None:
    assert [kernel.choose_tiling(rows).rows for rows in (1, 16, 17, 128, 129, 8192)] == [16, 16, 64, 64, 128, 128]
