"""Greedy and Gumbel-max draws over logits without a sort, and the advance of a slot's state on the GPU.

The noise is the reference's counter-based hash of (seed, step, token id), so a request draws the same tokens in any batch, on
the CPU and on the GPU.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

CHUNK = 8192  # vocabulary entries of one program of the first kernel
BLOCK = 2048
RING = 64  # tokens that a slot keeps before the host must have read them


@triton.jit
def mix(x):
    """lowbias32 (C. Wellons)."""
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def noise_state(seed, step):
    """What the noise of a row at a step depends on. seed: int64; step: int32."""
    low, high = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return mix(mix(low ^ mix(high)) ^ step.to(tl.uint32))


@triton.jit
def gumbel(state, at):
    """Gumbel noise of the tokens `at`: int32."""
    uniform = (mix(state ^ at.to(tl.uint32)).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    # At most the largest float below one: its noise must stay finite.
    return -tl.log(-tl.log(tl.minimum(uniform, 0.999999940395355)))


@triton.jit
def _best_kernel(
    logits, slots, temperatures, seeds, steps, values, ids, vocab, stride, parts,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    part, row = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    slot = tl.load(slots + row)
    temperature = tl.load(temperatures + slot)
    n = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.zeros((BLOCK,), tl.int32)
    base = logits + row.to(tl.int64) * stride
    if temperature < 1e-5:
        for start in range(0, CHUNK, BLOCK):
            at = part * CHUNK + start + n
            value = tl.load(base + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
            better = value > best
            best, where = tl.where(better, value, best), tl.where(better, at, where)
    else:
        state = noise_state(tl.load(seeds + slot), tl.load(steps + slot))
        for start in range(0, CHUNK, BLOCK):
            at = part * CHUNK + start + n
            value = tl.load(base + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
            value = value / temperature + gumbel(state, at)
            better = value > best
            best, where = tl.where(better, value, best), tl.where(better, at, where)
    top = tl.max(best, 0)
    first = tl.min(tl.where(best == top, where, vocab), 0)
    tl.store(values + row * parts + part, top)
    tl.store(ids + row * parts + part, first)


@triton.jit
def _advance_kernel(
    values, ids, slots, tokens, positions, steps, ring, parts, scratch, PARTS: tl.constexpr, RING: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    n = tl.arange(0, PARTS)
    value = tl.load(values + row * parts + n, mask=n < parts, other=float("-inf"))
    where = tl.load(ids + row * parts + n, mask=n < parts, other=0x7FFFFFFF)
    token = tl.min(tl.where(value == tl.max(value, 0), where, 0x7FFFFFFF), 0)
    slot = tl.load(slots + row)
    # Rows that only fill a bucket share the scratch slot, which stands still.
    if slot != scratch:
        step = tl.load(steps + slot)
        tl.store(tokens + slot, token)
        tl.store(ring + slot * RING + step % RING, token)
        tl.store(positions + slot, tl.load(positions + slot) + 1)
        tl.store(steps + slot, step + 1)


class DrawWorkspace:
    """Best value and id of every chunk of the vocabulary for up to `rows` rows."""

    def __init__(self, rows: int, vocab: int, device: str) -> None:
        self.parts = triton.cdiv(vocab, CHUNK)
        self.values = torch.empty(rows * self.parts, dtype=torch.float32, device=device)
        self.ids = torch.empty(rows * self.parts, dtype=torch.int32, device=device)


def draw(
    logits: torch.Tensor,
    slots: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    steps: torch.Tensor,
    workspace: DrawWorkspace,
    pdl: bool = False,
) -> None:
    """Leave the candidates of each row in `workspace`: the best of every chunk of the vocabulary.

    logits: [rows, vocab], bf16 or float32; slots: int32 [rows]; temperatures: float32 [slots], below 1e-5 for greedy; seeds: int64
    [slots]; steps: int32 [slots].
    """
    rows, vocab = logits.shape
    extra = {"launch_pdl": True} if pdl else {}
    _best_kernel[(workspace.parts, rows)](
        logits, slots, temperatures, seeds, steps, workspace.values, workspace.ids, vocab, logits.stride(0), workspace.parts,
        CHUNK=CHUNK, BLOCK=BLOCK, PDL=pdl, num_warps=4, **extra,
    )  # fmt: skip


def advance(
    values: torch.Tensor,
    ids: torch.Tensor,
    parts: int,
    slots: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    steps: torch.Tensor,
    ring: torch.Tensor,
    pdl: bool = False,
) -> None:
    """Make the best of each row's `parts` candidates (values, ids: [rows, parts], lowest id among equals) the slot's last token.

    Its position and step go on by one, and the token enters the ring. slots: int32 [rows], where the last slot is scratch; tokens,
    positions, steps: int32 [slots]; ring: int32 [slots, RING].
    """
    extra = {"launch_pdl": True} if pdl else {}
    _advance_kernel[(slots.shape[0],)](
        values, ids, slots, tokens, positions, steps, ring, parts, tokens.shape[0] - 1,
        PARTS=triton.next_power_of_2(parts), RING=RING, PDL=pdl, num_warps=1, **extra,
    )  # fmt: skip
