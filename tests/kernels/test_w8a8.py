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
    codes, scales = reference.quantize_rows(
        x.cpu(), kind
    )  # torch divides by a number on a CPU, and multiplies by its inverse on a GPU
    assert found.scales.cpu().equal(scales)
    assert found.values.float().cpu().equal(codes.float())
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
@pytest.mark.parametrize(
    "tiling", [kernel.Tiling(16, 32, 64, 2, 4), kernel.Tiling(128, 64, 128, 2, 8), kernel.Tiling(16, 64, 64, 2, 4, swapped=True)]
)
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tiling", [kernel.Tiling(16, 64, 32, 2, 4, 4, True), kernel.Tiling(64, 32, 64, 2, 4, 2)])
def test_a_norm_adds_the_parts_of_a_product(kind: torch.dtype, tiling: kernel.Tiling) -> None:
    """As if the product had been whole."""
    torch.manual_seed(3)
    for rows, n, k in ((1, 64, 256), (20, 96, 200)):
        x = kernel.Codes(*reference.quantize_rows(bf16(rows, k), kind))
        w = kernel.Codes(*reference.quantize_rows(bf16(n, k, spread=0.05), kind))
        parts = kernel.linear_parts(x, w, tiling)
        assert parts.shape == (tiling.splits, rows, n) and parts.dtype is torch.float32
        wanted = reference.linear(*x, *w)
        # Tensor cores keep 14 bits or so of a sum of FP8.
        assert float((parts.double().sum(0) - wanted).norm() / wanted.norm()) < (1e-5 if kind is torch.int8 else 1e-3)
        residual, weight = bf16(rows, n, spread=4.0), 1 + bf16(n, spread=0.2)
        normed, total = add_rms_norm(wanted.bfloat16(), residual, weight, 1e-5)
        codes = values(kernel.add_norm(parts, residual, weight, 1e-5, kind))
        assert float((residual.double() - total.double()).abs().max() / total.double().abs().max()) < 2**-7
        largest = normed.double().abs().amax(-1, keepdim=True)
        assert bool(((codes - normed.double()).abs() <= (STEP[kind] + BEFORE) * largest).all())


def test_a_product_that_is_not_worth_splitting_is_one_part() -> None:
    torch.manual_seed(4)
    x = kernel.Codes(*reference.quantize_rows(bf16(3, 64), torch.int8))
    w = kernel.Codes(*reference.quantize_rows(bf16(32, 64), torch.int8))
    parts = kernel.linear_parts(x, w)
    assert parts.dtype is torch.bfloat16 and parts[0].equal(kernel.linear(x, w))


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 256, 300, 512, 513, 2047, 2048, 8192])
def test_every_batch_keeps_the_card_at_work(rows: int, kind: torch.dtype) -> None:
    """Llama 3.2 1B and 3B. The parts of a sum may not be too small, nor too many bytes."""
    for hidden, query_and_kv, wide in ((2048, 3072, 8192), (3072, 5120, 8192)):
        for k in (hidden, wide):
            split = kernel.choose_split(rows, hidden, k, kind)
            assert -(-rows // split.rows) * (hidden // split.columns) * split.splits >= 120
            assert split.splits == 1 or (k // split.splits >= 512 and 4 * split.splits * rows * hidden <= 16 * 2**20)
        for n in (query_and_kv, 2 * wide):
            whole = kernel.choose_tiling(rows, n, kind)
            assert whole.splits == 1 and -(-rows // whole.rows) * (n // whole.columns) >= 48
