"""Draws under top-k, top-p and min-p without a sort, token for token those of `sampling.reference.sample`.

Tokens are ranked by (logit, lower id first), and each filter keeps the beginning of that ranking. A Gumbel draw from everything is
also the draw from what is kept if the drawn token is kept; if it is not, nothing behind it is either, so the next draw is among
the tokens before it. Whether a token is kept takes one sum over the row. A peaked distribution needs one or two draws, a flat one
about log2(vocabulary / kept). Only top-k needs its bound beforehand (top-p is a share of what top-k has left): the k-th logit is
found from its bits, two a pass.

One program does a row: it reads 256 KB of bf16 logits from the L2 cache per pass, and rows without filters leave at once.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from altiplano_kernels.sampling.kernel import DrawWorkspace, mix

BLOCK = 8192


@triton.jit
def _ranks_before(value, at, bound, last):
    """Whether (value, at) comes before (bound, last) in the ranking."""
    return (value > bound) | ((value == bound) & (at < last))


@triton.jit
def _ordered(value, WIDE: tl.constexpr):
    """Integers in the order of floats, as uint32: all 32 bits, or the upper 16 of what was bf16. Zeros have one sign."""
    bits = (value + 0.0).to(tl.uint32, bitcast=True)
    sign = tl.full((), 0x80000000, tl.uint32)
    bits = tl.where(bits >= sign, bits ^ 0xFFFFFFFF, bits | sign)
    return bits if WIDE else bits >> 16


@triton.jit
def _kth(base, k, vocab, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The k-th logit of a row as (value, last): kept is what ranks before (value, last)."""
    n = tl.arange(0, BLOCK)
    BITS: tl.constexpr = 32 if WIDE else 16
    found = tl.zeros((), tl.uint32)
    for digit in range(BITS // 2):
        shift = BITS - 2 - 2 * digit
        one, two, three = (
            found + (1 << shift).to(tl.uint32),
            found + (2 << shift).to(tl.uint32),
            found + (3 << shift).to(tl.uint32),
        )
        least_one, least_two, least_three = 0, 0, 0
        for start in range(0, vocab, BLOCK):
            at = start + n
            key = _ordered(tl.load(base + at, mask=at < vocab, other=float("-inf")).to(tl.float32), WIDE)
            inside = at < vocab
            least_one += tl.sum((inside & (key >= one)).to(tl.int32), 0)
            least_two += tl.sum((inside & (key >= two)).to(tl.int32), 0)
            least_three += tl.sum((inside & (key >= three)).to(tl.int32), 0)
        found = tl.where(least_three >= k, three, tl.where(least_two >= k, two, tl.where(least_one >= k, one, found)))
    above = 0
    for start in range(0, vocab, BLOCK):
        at = start + n
        key = _ordered(tl.load(base + at, mask=at < vocab, other=float("-inf")).to(tl.float32), WIDE)
        above += tl.sum(((at < vocab) & (key > found)).to(tl.int32), 0)
    # Of those that are equal to the k-th, the first ones by id.
    equal, last = 0, vocab
    for start in range(0, vocab, BLOCK):
        at = start + n
        key = _ordered(tl.load(base + at, mask=at < vocab, other=float("-inf")).to(tl.float32), WIDE)
        same = ((at < vocab) & (key == found)).to(tl.int32)
        hit = (same == 1) & (equal + tl.cumsum(same, 0) == k - above)
        last = tl.minimum(last, tl.min(tl.where(hit, at + 1, vocab), 0))
        equal += tl.sum(same, 0)
    bits = found if WIDE else found << 16
    sign = tl.full((), 0x80000000, tl.uint32)
    bits = tl.where(bits >= sign, bits ^ sign, bits ^ (0xFFFFFFFF if WIDE else 0xFFFF0000))
    return bits.to(tl.float32, bitcast=True), last


@triton.jit
def _mass(base, bound, last, first_bound, first_last, top, temperature, vocab, BLOCK: tl.constexpr):
    """Sum of exp((logit - top) / temperature) over what ranks before both bounds."""
    n = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        at = start + n
        value = tl.load(base + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        counted = _ranks_before(value, at, bound, last) & _ranks_before(value, at, first_bound, first_last)
        total += tl.where(counted, tl.exp((value - top) / temperature), 0.0)
    return tl.sum(total, 0)


@triton.jit
def _draw_filtered_kernel(
    logits, slots, temperatures, top_ks, top_ps, min_ps, seeds, steps, values, ids, vocab, stride, parts,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    slot = tl.load(slots + row)
    temperature, top_k = tl.load(temperatures + slot), tl.load(top_ks + slot)
    top_p, min_p = tl.load(top_ps + slot), tl.load(min_ps + slot)
    limited = (top_k > 0) & (top_k < vocab)
    if (temperature >= 1e-5) & (limited | (top_p < 1) | (min_p > 0)):
        n = tl.arange(0, BLOCK)
        base = logits + row.to(tl.int64) * stride
        highest = tl.full((BLOCK,), float("-inf"), tl.float32)
        for start in range(0, vocab, BLOCK):
            at = start + n
            highest = tl.maximum(highest, tl.load(base + at, mask=at < vocab, other=float("-inf")).to(tl.float32))
        top = tl.max(highest, 0)
        top = tl.where(top > float("-inf"), top, 0.0)
        # What is impossible has no part in anything: id 0 of -inf excludes all of them.
        bound, last = float("-inf"), 0
        if limited:
            bound, last = _kth(base, top_k, vocab, BLOCK, WIDE)
        first_bound, first_last = bound, last
        allowed = 1.0
        if top_p < 1:
            allowed = top_p * _mass(base, bound, last, bound, last, top, temperature, vocab, BLOCK)
        seed = tl.load(seeds + slot)
        low, high = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
        state = mix(mix(low ^ mix(high)) ^ tl.load(steps + slot).to(tl.uint32))
        token, kept = 0, 0
        while kept == 0:
            best = tl.full((BLOCK,), float("-inf"), tl.float32)
            where = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
            for start in range(0, vocab, BLOCK):
                at = start + n
                value = tl.load(base + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
                uniform = (mix(state ^ at.to(tl.uint32)).to(tl.float32) + 0.5) * 2.3283064365386963e-10
                noisy = value / temperature - tl.log(-tl.log(tl.minimum(uniform, 0.999999940395355)))
                candidate = _ranks_before(value, at, bound, last) & (tl.exp((value - top) / temperature) >= min_p)
                better = candidate & (noisy > best)
                best, where = tl.where(better, noisy, best), tl.where(better, at, where)
            token = tl.min(tl.where(best == tl.max(best, 0), where, 0x7FFFFFFF), 0)
            kept = 1
            # Nothing to draw from: logits of -inf alone. The plain draw stands.
            if (token < vocab) & (top_p < 1):
                drawn = tl.load(base + token).to(tl.float32)
                before = _mass(base, drawn, token, first_bound, first_last, top, temperature, vocab, BLOCK)
                if (before > 0) & (before >= allowed):
                    bound, last, kept = drawn, token, 0
        if token < vocab:
            tl.store(values + row * parts, float("inf"))
            tl.store(ids + row * parts, token)


def draw_filtered(
    logits: torch.Tensor,
    slots: torch.Tensor,
    temperatures: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    seeds: torch.Tensor,
    steps: torch.Tensor,
    workspace: DrawWorkspace,
    pdl: bool = False,
    block: int = BLOCK,
) -> None:
    """Put the draw of each row that has a filter in front of the candidates of the plain draw, which must be in `workspace`.

    logits: [rows, vocab], bf16 or float32; slots: int32 [rows]; temperatures, top_ps, min_ps: float32 [slots]; top_ks: int32
    [slots], 0 for no limit; seeds: int64 [slots]; steps: int32 [slots]. Greedy rows and rows without filters stay as they are.
    """
    rows, vocab = logits.shape
    extra = {"launch_pdl": True} if pdl else {}
    _draw_filtered_kernel[(rows,)](
        logits, slots, temperatures, top_ks, top_ps, min_ps, seeds, steps, workspace.values, workspace.ids, vocab, logits.stride(0),
        workspace.parts, BLOCK=block, WIDE=logits.dtype is torch.float32, PDL=pdl, num_warps=16, **extra,
    )  # fmt: skip
