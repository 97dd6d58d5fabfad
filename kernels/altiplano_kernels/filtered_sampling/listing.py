"""Top-k by one program a row: the few tokens that can be among the k first, and the draw from those that are."""

import triton
import triton.language as tl

from altiplano_kernels.filtered_sampling.ranking import NONE, finite, kth_key, ordered, ranks_before
from altiplano_kernels.sampling.kernel import gumbel


@triton.jit
def list_tokens(
    logits, maxima, picked, listed, groups, k, vocab, GROUPS: tl.constexpr, GROUP: tl.constexpr, LIST: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """How many tokens reach the k-th largest of the maxima of groups; `listed` has the first of them, by id. -1: k is too large."""
    count = -1
    if k <= groups // 2:
        g = tl.arange(0, GROUPS)
        highest = tl.load(maxima + g, mask=g < groups, other=float("-inf"))
        key = ordered(highest, WIDE)
        bound = kth_key(key, k, WIDE)
        hit = ((key >= bound) & (highest > float("-inf"))).to(tl.int32)
        tl.store(picked + tl.cumsum(hit, 0) - 1, g, mask=hit == 1)
        tl.debug_barrier()  # what the program has stored, it loads again in other threads
        count = 0
        BLOCK: tl.constexpr = LIST
        n = tl.arange(0, BLOCK)
        for start in range(0, tl.sum(hit, 0), BLOCK // GROUP):
            place = start + n // GROUP
            some = place < tl.sum(hit, 0)
            at = tl.load(picked + place, mask=some, other=0) * GROUP + n % GROUP
            x = tl.load(logits + at, mask=some & (at < vocab), other=float("-inf")).to(tl.float32)
            reached = ((x > float("-inf")) & (ordered(x, WIDE) >= bound)).to(tl.int32)
            spot = count + tl.cumsum(reached, 0) - 1
            tl.store(listed + spot, at, mask=(reached == 1) & (spot < LIST))
            count += tl.sum(reached, 0)
        tl.debug_barrier()
    return count


@triton.jit
def draw_listed(logits, listed, count, temperature, top_k, top_p, min_p, state, LIST: tl.constexpr, WIDE: tl.constexpr):
    """The draw from `count` listed tokens; NONE where there is none."""
    n = tl.arange(0, LIST)
    at = tl.load(listed + n, mask=n < count, other=NONE)
    x = tl.load(logits + at, mask=n < count, other=float("-inf")).to(tl.float32)
    key = tl.where(n < count, ordered(x, WIDE), 0)
    least = kth_key(key, top_k, WIDE)
    # Of those that are equal to the k-th, the first ones by id, which is the list's order.
    same = (key == least).to(tl.int32)
    room = top_k - tl.sum((key > least).to(tl.int32), 0)
    kept = (n < count) & ((key > least) | ((same == 1) & (tl.cumsum(same, 0) <= room)))
    mass = tl.where(kept, tl.exp((x - finite(tl.max(x, 0))) * (1.0 / temperature)), 0.0)
    allowed = top_p * tl.sum(mass, 0)
    noisy = tl.where(kept & (mass >= min_p), x / temperature + gumbel(state, at), float("-inf"))
    drawn = -1
    while drawn == -1:
        best = tl.max(noisy, 0)
        drawn = tl.min(tl.where((noisy == best) & (noisy > float("-inf")), at, NONE), 0)
        if (top_p < 1) & (drawn < NONE):
            value = tl.max(tl.where(at == drawn, x, float("-inf")), 0)
            ahead = ranks_before(x, at, value, drawn)
            before = tl.sum(tl.where(ahead, mass, 0.0), 0)
            if (before > 0) & (before >= allowed):
                noisy = tl.where(ahead, noisy, float("-inf"))
                drawn = -1
    return drawn
