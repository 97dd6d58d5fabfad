"""Weights as codes of 8, 6 or 4 bits with one float16 scale per row and 128 inputs, in the order in which linear.cu reads them."""

from dataclasses import dataclass

import torch

GROUP = 128
LIMITS = {8: (-127, 127), 6: (-31, 31), 4: (-8, 7)}


@dataclass(frozen=True)
class Packed:
    """codes: uint8 [tiles, k / 128, 32 lanes, 8 * bits]; scales: float16 [tiles, k / 128, 8, 2]. Rows of a tile as in `tile_rows`."""

    codes: torch.Tensor
    scales: torch.Tensor
    bits: int
    shape: tuple[int, int]
    head_dim: int = 16  # of `tile_rows`; 16: rows are no heads
    halves: bool = False


def tile_rows(n: int, head_dim: int = 16, halves: bool = False) -> torch.Tensor:
    """int64 [tiles, 16]: the rows of n that share a tile. Rows 8 apart in it meet in one thread: d and d + head_dim / 2 of a head,
    or gate and up where the rows are two `halves`; plain neighbours with neither."""
    rows = torch.arange(n)
    if halves:
        return rows.view(2, -1, 8).transpose(0, 1).reshape(-1, 16)
    return rows.view(-1, 2, head_dim // 16, 8).transpose(1, 2).reshape(-1, 16)


def quantize(w: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [n, k] and scales float16 [n, k / 128] of w: [n, k], rounded to nearest, symmetric.

    The scale of 4 bits maps the group's extreme value to -8 when it is negative and to 8, one beyond the last code, when it is
    positive, then its sign is turned: the extreme is always met (as GGUF's Q4_0 does).
    """
    low, high = LIMITS[bits]
    groups = w.float().view(w.shape[0], -1, GROUP)
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = extreme / low if bits == 4 else extreme.abs() / high
    scale = torch.where(scale.abs() < 1e-7, 1e-7, scale).half()
    codes = (groups / scale.float()).round().clamp(low, high)
    return codes.to(torch.int8).view(w.shape), scale[..., 0]


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 [n, k] of `quantize`'s codes and scales."""
    return (codes.float().view(codes.shape[0], -1, GROUP) * scales.float()[..., None]).view(codes.shape)


def pack(codes: torch.Tensor, scales: torch.Tensor, bits: int, head_dim: int = 16, halves: bool = False) -> Packed:
    """`quantize`'s codes and scales in the kernels' order; the rest as for `tile_rows`."""
    n, k = codes.shape
    rows = tile_rows(n, head_dim, halves).to(codes.device)
    # [tiles, side, g, chunk, quarter, t, e]: a lane (g, t) takes 8 neighbours e of both sides from each quarter of a chunk.
    split = codes[rows].view(-1, 2, 8, k // GROUP, 4, 4, 8).permute(0, 3, 2, 5, 4, 1, 6)
    if bits == 8:
        packed = (split.to(torch.int16) + 128).to(torch.uint8)
    else:
        raised = split + (1 << bits - 1)
        packed = _words(raised, 0, 4).flatten(-2)
        if bits == 6:
            # The high bits of all quarters come behind the low ones: those of near codes in the low byte of each half, of far ones above.
            near, far = _words(raised, 4, 2).unbind(-1)
            packed = torch.cat((packed, near | far << 8), -1)
        packed = packed.contiguous().view(torch.uint8)
    packed = packed.reshape(len(rows), k // GROUP, 32, 8 * bits).contiguous()
    pairs = scales[rows].view(-1, 2, 8, k // GROUP).permute(0, 3, 2, 1).contiguous()
    return Packed(packed, pairs, bits, (n, k), head_dim, halves)


def _words(codes: torch.Tensor, first: int, width: int) -> torch.Tensor:
    """Some bits of codes, int8 [..., 8], as int32 [...]: those of code e lie e // 2 * width bits up in half e % 2 of a word."""
    word = torch.zeros(codes.shape[:-1], dtype=torch.int32, device=codes.device)
    for e in range(8):
        bits = codes[..., e].int() >> first & (1 << width) - 1
        word |= bits << (width * (e // 2) + 16 * (e % 2))
    return word
