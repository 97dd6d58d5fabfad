"""Codes of 8, 6 and 4 bits in the order in which linear.cu reads them, followed on the CPU lane by lane as the kernel does."""

import pytest
import torch

from altiplano_kernels.few_rows.quantized import Packed, dequantize, pack, quantize


def codes_of_lane(packed: Packed, tile: int, chunk: int, lane: int, quarter: int, side: int) -> list[int]:
    """Eight neighbouring codes as `expand` in linear.cu takes them from a lane's bytes."""
    lane_bytes = packed.codes[tile, chunk, lane]
    if packed.bits == 8:
        first = (4 * quarter + 2 * side) * 4
        return [int(byte) - 128 for byte in lane_bytes[first : first + 8]]
    words = [int(word) & 0xFFFFFFFF for word in lane_bytes.view(torch.int32)]
    low = [words[2 * quarter + side] >> (4 * (e // 2) + 16 * (e % 2)) & 15 for e in range(8)]
    if packed.bits == 4:
        return [code - 8 for code in low]
    high = [words[8 + quarter] >> (2 * (e // 2) + 16 * (e % 2) + 8 * side) & 3 for e in range(8)]
    return [code + 16 * two - 32 for code, two in zip(low, high, strict=True)]


@pytest.mark.parametrize(("head_dim", "halves"), [(16, False), (64, False), (128, False), (16, True)])
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_every_code_and_scale_is_where_its_lane_looks(bits: int, head_dim: int, halves: bool) -> None:
    torch.manual_seed(bits)
    n, k = 128, 256
    codes, scales = quantize(torch.randn(n, k), bits)
    packed = pack(codes, scales, bits, head_dim, halves)
    far = n // 2 if halves else head_dim // 2
    for tile in range(n // 16):
        per_head = head_dim // 16
        near = tile * 8 if halves else tile // per_head * head_dim + tile % per_head * 8
        for chunk, lane, quarter, side in [(0, 0, 0, 0), (1, 31, 3, 1), (0, 13, 2, 1), (1, 6, 1, 0)]:
            row, at = near + lane // 4 + side * far, chunk * 128 + quarter * 32 + lane % 4 * 8
            assert codes_of_lane(packed, tile, chunk, lane, quarter, side) == codes[row, at : at + 8].tolist()
            assert packed.scales[tile, chunk, lane // 4, side] == scales[row, chunk]


@pytest.mark.parametrize(("bits", "most"), [(8, 0.008), (6, 0.03), (4, 0.11)])
def test_rounding_errs_by_half_a_code_at_most(bits: int, most: float) -> None:
    torch.manual_seed(0)
    w = torch.randn(64, 512) * 0.02
    w[3, 128:256] = 0.0
    codes, scales = quantize(w, bits)
    found = dequantize(codes, scales)
    assert float((found - w).norm() / w.norm()) < most
    # Only the one value beyond the largest 4-bit code errs by more than half a code.
    steps = (found - w).abs().view(64, -1, 128) / scales.float().abs()[..., None]
    assert float(steps.max()) < (1.01 if bits == 4 else 0.51)
    assert bool((found[3, 128:256] == 0).all())
