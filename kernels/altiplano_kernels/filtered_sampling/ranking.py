"""Tokens ranked by (logit, lower id first), and the k-th of them."""

import triton
import triton.language as tl

NONE = tl.constexpr(0x7FFFFFFF)  # the id of no token


@triton.jit
def ranks_before(value, at, bound, last):
    """Whether (value, at) comes before (bound, last) in the ranking."""
    return (value > bound) | ((value == bound) & (at < last))


@triton.jit
def ordered(value, WIDE: tl.constexpr):
    """Integers in the order of floats, as uint32, from 1: all 32 bits, or the upper 16 of what was bf16. Zeros have one sign."""
    bits = (value + 0.0).to(tl.uint32, bitcast=True)
    sign = tl.full((), 0x80000000, tl.uint32)
    bits = tl.where(bits >= sign, bits ^ 0xFFFFFFFF, bits | sign)
    return bits if WIDE else bits >> 16


@triton.jit
def kth_key(key, k, WIDE: tl.constexpr):
    """The k-th largest of less than 2^20 keys, two bits a pass; zero, which stands for no key, if there are not so many."""
    BITS: tl.constexpr = 32 if WIDE else 16
    found = tl.zeros((), tl.uint32)
    for digit in range(BITS // 2):
        shift = BITS - 2 - 2 * digit
        one, two, three = (
            found + (1 << shift).to(tl.uint32),
            found + (2 << shift).to(tl.uint32),
            found + (3 << shift).to(tl.uint32),
        )
        least = (key >= one).to(tl.int64) + ((key >= two).to(tl.int64) << 20) + ((key >= three).to(tl.int64) << 40)
        counts = tl.sum(least, 0)
        enough = (counts & 0xFFFFF >= k, (counts >> 20) & 0xFFFFF >= k, counts >> 40 >= k)
        found = tl.where(enough[2], three, tl.where(enough[1], two, tl.where(enough[0], one, found)))
    return found


@triton.jit
def finite(top):
    """The largest of some logits, or anything to take from them where all are -inf."""
    return tl.where(top > float("-inf"), top, 0.0)
