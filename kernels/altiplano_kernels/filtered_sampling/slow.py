"""The filtered draw of one row by one program, for rows that the parallel way gives up: any filters, any logits, many passes."""

import triton
import triton.language as tl

from altiplano_kernels.filtered_sampling.ranking import NONE, ordered, ranks_before
from altiplano_kernels.sampling.kernel import gumbel


@triton.jit
def draw_slowly(base, temperature, top_k, top_p, min_p, limited, state, vocab, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The token, or NONE from a row of -inf alone. base: where the row begins; state: of its noise."""
    n = tl.arange(0, BLOCK)
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
    token, kept = 0, 0
    while kept == 0:
        best = tl.full((BLOCK,), float("-inf"), tl.float32)
        where = tl.full((BLOCK,), NONE, tl.int32)
        for start in range(0, vocab, BLOCK):
            at = start + n
            value = tl.load(base + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
            noisy = value / temperature + gumbel(state, at)
            candidate = ranks_before(value, at, bound, last) & (tl.exp((value - top) / temperature) >= min_p)
            better = candidate & (noisy > best)
            best, where = tl.where(better, noisy, best), tl.where(better, at, where)
        token = tl.min(tl.where(best == tl.max(best, 0), where, NONE), 0)
        kept = 1
        if (token < vocab) & (top_p < 1):
            drawn = tl.load(base + token).to(tl.float32)
            before = _mass(base, drawn, token, first_bound, first_last, top, temperature, vocab, BLOCK)
            if (before > 0) & (before >= allowed):
                bound, last, kept = drawn, token, 0
    return token


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
            key = ordered(tl.load(base + at, mask=at < vocab, other=float("-inf")).to(tl.float32), WIDE)
            inside = at < vocab
            least_one += tl.sum((inside & (key >= one)).to(tl.int32), 0)
            least_two += tl.sum((inside & (key >= two)).to(tl.int32), 0)
            least_three += tl.sum((inside & (key >= three)).to(tl.int32), 0)
        found = tl.where(least_three >= k, three, tl.where(least_two >= k, two, tl.where(least_one >= k, one, found)))
    above = 0
    for start in range(0, vocab, BLOCK):
        at = start + n
        key = ordered(tl.load(base + at, mask=at < vocab, other=float("-inf")).to(tl.float32), WIDE)
        above += tl.sum(((at < vocab) & (key > found)).to(tl.int32), 0)
    # Of those that are equal to the k-th, the first ones by id.
    equal, last = 0, vocab
    for start in range(0, vocab, BLOCK):
        at = start + n
        key = ordered(tl.load(base + at, mask=at < vocab, other=float("-inf")).to(tl.float32), WIDE)
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
        counted = ranks_before(value, at, bound, last) & ranks_before(value, at, first_bound, first_last)
        total += tl.where(counted, tl.exp((value - top) / temperature), 0.0)
    return tl.sum(total, 0)
