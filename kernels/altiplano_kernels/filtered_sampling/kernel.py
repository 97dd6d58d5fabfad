"""Draws under top-k, top-p and min-p without a sort, token for token those of `sampling.reference.sample`.

Tokens are ranked by (logit, lower id first), and each filter keeps the beginning of that ranking. A Gumbel draw from everything is
also the draw from what is kept if the drawn token is kept; if it is not, nothing behind it is either, and the next draw is among
the tokens before it. So the plain draw, which is made before, stands with a probability of top_p or more, whatever the row is like.
Under top-k it nearly never does, but then few tokens are left: of the maxima of groups of 64 tokens, the k-th largest is a lower
bound of the k-th logit, so only groups that reach it are looked at again (of 2004 groups, 50 have 51 such tokens; 512 have 590).

    survey   each part of a row   maxima of its groups, or its mass and the mass before the drawn token
    narrow   each part            where the drawn token is not kept, the part's best draws before that one
    weigh    each part            masses before each of the row's next draws
    finish   each row             the first of them that is kept; or tokens that reach the bound, the exact one, and the draw

Launches do not depend on data, and rows without filters leave each of them at once. Rows that do not fit (k above half the groups,
hundreds of equal logits at the bound, every known draw behind top-p) are done by `slow` in the last one: one program, about
100 µs and more.

Measured on an H200 at 128 256 entries, beside the plain draw (benchmarks/engine/LADDER.md): one row 5 µs where that draw stands, 20 to 35 µs
where it does not and 19 µs under top-k 50; 256 rows 69 µs under top-k 50 and 143 µs under top-p 0.9.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from altiplano_kernels.filtered_sampling.listing import draw_listed, list_tokens
from altiplano_kernels.filtered_sampling.ranking import NONE, finite, ranks_before
from altiplano_kernels.filtered_sampling.slow import draw_slowly
from altiplano_kernels.sampling.kernel import DrawWorkspace, gumbel, noise_state

DONE, LISTED, CHAINED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Of a part: largest logit; mass relative to that one; mass before the drawn token; logit of the drawn token.
SUMS = tl.constexpr(4)


class Sizes(NamedTuple):
    """Powers of two: entries of a part and of a group; tokens of a row that can be listed; draws of a part that can follow."""

    part: int
    group: int
    listed: int
    members: int


SIZES = Sizes(8192, 64, 2048, 8)


@triton.jit
def _settings(slots, temperatures, top_ks, top_ps, min_ps, row, vocab):
    """(temperature, top_p, min_p, whether top-k limits, whether anything does) of a row."""
    slot = tl.load(slots + row)
    temperature, top_k = tl.load(temperatures + slot), tl.load(top_ks + slot)
    top_p, min_p = tl.load(top_ps + slot), tl.load(min_ps + slot)
    limited = (top_k > 0) & (top_k < vocab)
    return temperature, top_p, min_p, limited, (temperature >= 1e-5) & (limited | (top_p < 1) | (min_p > 0))


@triton.jit
def _followers(top_p, MEMBERS: tl.constexpr):
    """How many draws behind the plain one are looked at: fewer where top-p is large, and one row in a thousand needs more than these."""
    return tl.where(top_p >= 1, 1, tl.where(top_p >= 0.75, min(3, MEMBERS), tl.where(top_p >= 0.4, min(5, MEMBERS), MEMBERS)))


@triton.jit
def _plain_draw(logits, values, ids, row, drawn, DRAWN: tl.constexpr):
    """(logit, id) of what the plain draw drew from the row; logits: where the row begins."""
    n = tl.arange(0, DRAWN)
    value = tl.load(values + row * drawn + n, mask=n < drawn, other=float("-inf"))
    token = tl.load(ids + row * drawn + n, mask=n < drawn, other=0x7FFFFFFF)
    first = tl.min(tl.where(value == tl.max(value, 0), token, 0x7FFFFFFF), 0)
    return tl.load(logits + first).to(tl.float32), first


@triton.jit
def _sums_of_row(sums, row, parts, inverse, PARTS: tl.constexpr):
    """(largest logit, mass, mass before the drawn token) of a row from those of its parts; masses relative to the largest."""
    n = tl.arange(0, PARTS)
    at = sums + (row * parts + n) * SUMS
    tops = tl.load(at, mask=n < parts, other=float("-inf"))
    top = tl.max(tops, 0)
    scales = tl.exp((tops - finite(top)) * inverse)
    total = tl.sum(scales * tl.load(at + 1, mask=n < parts, other=0.0), 0)
    return top, total, tl.sum(scales * tl.load(at + 2, mask=n < parts, other=0.0), 0)


@triton.jit
def _survey_kernel(
    logits, slots, temperatures, top_ks, top_ps, min_ps, values, ids, maxima, sums, vocab, stride, drawn,
    PART: tl.constexpr, GROUP: tl.constexpr, DRAWN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    part, row, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    temperature, _, _, limited, filtered = _settings(slots, temperatures, top_ks, top_ps, min_ps, row, vocab)
    if filtered:
        base = logits + row.to(tl.int64) * stride
        at = part * PART + tl.arange(0, PART)
        x = tl.load(base + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        if limited:
            GROUPS: tl.constexpr = PART // GROUP
            highest = tl.max(tl.reshape(x, (GROUPS, GROUP)), 1)
            tl.store(maxima + (row * parts + part) * GROUPS + tl.arange(0, GROUPS), highest)
        else:
            value, token = _plain_draw(base, values, ids, row, drawn, DRAWN)
            top = tl.max(x, 0)
            mass = tl.exp((x - finite(top)) * (1.0 / temperature))
            spot = sums + (row * parts + part) * SUMS
            tl.store(spot, top)
            tl.store(spot + 1, tl.sum(mass, 0))
            tl.store(spot + 2, tl.sum(tl.where(ranks_before(x, at, value, token), mass, 0.0), 0))
            tl.store(spot + 3, value)


@triton.jit
def _narrow_kernel(
    logits, slots, temperatures, top_ks, top_ps, min_ps, seeds, steps, values, ids, sums, states,
    chain_noisy, chain_values, chain_ids, vocab, stride, drawn,
    PART: tl.constexpr, MEMBERS: tl.constexpr, PARTS: tl.constexpr, DRAWN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    part, row, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    temperature, top_p, min_p, limited, filtered = _settings(slots, temperatures, top_ks, top_ps, min_ps, row, vocab)
    state = DONE
    if filtered & limited:
        state = LISTED
    elif filtered:
        inverse = 1.0 / temperature
        top, total, before = _sums_of_row(sums, row, parts, inverse, PARTS)
        value = tl.load(sums + row * parts * SUMS + 3)
        kept = (top_p >= 1) | (before <= 0) | (before < top_p * total)
        kept &= (min_p <= 0) | (tl.exp((value - finite(top)) * inverse) >= min_p)
        # A row of -inf alone has nothing to draw from: its plain draw stands.
        if (top > float("-inf")) & (kept == 0):
            state = CHAINED
            base = logits + row.to(tl.int64) * stride
            at = part * PART + tl.arange(0, PART)
            x = tl.load(base + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
            slot = tl.load(slots + row)
            noise = gumbel(noise_state(tl.load(seeds + slot), tl.load(steps + slot)), at)
            value, token = _plain_draw(base, values, ids, row, drawn, DRAWN)
            able = ranks_before(x, at, value, token) & (tl.exp((x - top) * inverse) >= min_p)
            noisy = tl.where(able, x / temperature + noise, float("-inf"))
            for member in range(_followers(top_p, MEMBERS)):
                best, place = tl.max(noisy, 0, return_indices=True)
                first = tl.where(best > float("-inf"), part * PART + place, NONE)
                value = tl.load(base + first, mask=first < NONE, other=float("-inf")).to(tl.float32)
                spot = (row * parts + part) * MEMBERS + member
                tl.store(chain_noisy + spot, best)
                tl.store(chain_values + spot, value)
                tl.store(chain_ids + spot, first)
                noisy = tl.where(ranks_before(x, at, value, first), noisy, float("-inf"))
    if part == 0:
        tl.store(states + row, state)


@triton.jit
def _weigh_kernel(
    logits, slots, temperatures, top_ps, sums, states, chain_noisy, chain_values, chain_ids, masses, tokens, vocab, stride,
    PART: tl.constexpr, MEMBERS: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    part, row, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if tl.load(states + row) == CHAINED:
        slot = tl.load(slots + row)
        inverse = 1.0 / tl.load(temperatures + slot)
        members = _followers(tl.load(top_ps + slot), MEMBERS)
        at = part * PART + tl.arange(0, PART)
        x = tl.load(logits + row.to(tl.int64) * stride + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        m = tl.arange(0, PARTS * MEMBERS)
        known = (m // MEMBERS < parts) & (m % MEMBERS < members)
        spot = row * parts * MEMBERS + m
        noisy = tl.load(chain_noisy + spot, mask=known, other=float("-inf"))
        value = tl.load(chain_values + spot, mask=known, other=float("-inf"))
        token = tl.load(chain_ids + spot, mask=known, other=NONE)
        # What follows the last draw that a part has room for is not known.
        cut = (m % MEMBERS == members - 1) & (token < NONE)
        top, _, _ = _sums_of_row(sums, row, parts, inverse, PARTS)
        mass = tl.exp((x - top) * inverse)
        sound = 1
        for member in range(members):
            # Equal ones come by part, and within a part by id.
            best, place = tl.max(noisy, 0, return_indices=True)
            some, winner = best > float("-inf"), row * parts * MEMBERS + place
            first = tl.load(chain_ids + winner, mask=some, other=NONE)
            bound = tl.load(chain_values + winner, mask=some, other=float("-inf"))
            ahead = ranks_before(x, at, bound, first)
            tl.store(masses + (row * parts + part) * MEMBERS + member, tl.sum(tl.where(ahead, mass, 0.0), 0))
            if part == 0:
                tl.store(tokens + row * MEMBERS + member, tl.where((sound == 1) & (first < NONE), first, -1))
            left = ranks_before(value, token, bound, first)
            noisy = tl.where(left, noisy, float("-inf"))
            sound = tl.where(tl.sum((cut & (left == 0)).to(tl.int32), 0) == 0, sound, 0)


@triton.jit
def _draw_chained(
    sums, masses, tokens, row, parts, temperature, top_p, PARTS: tl.constexpr, MEMBERS: tl.constexpr
):  # fmt: skip
    """The first of a row's next draws that is kept; -1 if none of those that are known is."""
    _, total, _ = _sums_of_row(sums, row, parts, 1.0 / temperature, PARTS)
    p, m = tl.arange(0, PARTS), tl.arange(0, MEMBERS)
    known = m < _followers(top_p, MEMBERS)
    spot = (row * parts + p[:, None]) * MEMBERS + m[None, :]
    ahead = tl.sum(tl.load(masses + spot, mask=(p < parts)[:, None] & known[None, :], other=0.0), 0)
    token = tl.load(tokens + row * MEMBERS + m, mask=known, other=-1)
    kept = (token >= 0) & ((ahead <= 0) | (ahead < tl.where(top_p < 1, top_p * total, float("inf"))))
    first = tl.min(tl.where(kept, m, MEMBERS), 0)
    return tl.max(tl.where(m == first, token, -1), 0)


@triton.jit
def _finish_kernel(
    logits, slots, temperatures, top_ks, top_ps, min_ps, seeds, steps, values, ids, maxima, sums, states, picked, listed, masses, tokens,
    vocab, stride, drawn, parts,
    PART: tl.constexpr, GROUP: tl.constexpr, LIST: tl.constexpr, MEMBERS: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    state = tl.load(states + row)
    if state != DONE:
        temperature, top_p, min_p, limited, _ = _settings(slots, temperatures, top_ks, top_ps, min_ps, row, vocab)
        slot = tl.load(slots + row)
        top_k, noise = tl.load(top_ks + slot), noise_state(tl.load(seeds + slot), tl.load(steps + slot))
        base, token = logits + row.to(tl.int64) * stride, -1
        if state == LISTED:
            groups = parts * (PART // GROUP)
            mine = listed + row * LIST
            count = list_tokens(
                base, maxima + row * groups, picked + row * groups, mine, groups, top_k, vocab, PARTS * PART // GROUP, GROUP, LIST, WIDE
            )  # fmt: skip
            if (count >= 0) & (count <= LIST):
                token = draw_listed(base, mine, count, temperature, top_k, top_p, min_p, noise, LIST, WIDE)
        else:
            token = _draw_chained(sums, masses, tokens, row, parts, temperature, top_p, PARTS, MEMBERS)
        if token == -1:
            token = draw_slowly(base, temperature, top_k, top_p, min_p, limited, noise, vocab, PART, WIDE)
        if token < vocab:
            tl.store(values + row * drawn, float("inf"))
            tl.store(ids + row * drawn, token)


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
    sizes: Sizes = SIZES,
) -> None:
    """Put the draw of each row that has a filter in front of the candidates that `draw` has left in `workspace`, or leave them.

    logits: [rows, vocab], bf16 or float32, the same that `draw` had; slots: int32 [rows]; temperatures, top_ps, min_ps: float32
    [slots]; top_ks: int32 [slots], 0 for no limit; seeds: int64 [slots]; steps: int32 [slots]. Greedy rows and rows without
    filters stay as they are. Capturable.
    """
    rows, vocab = logits.shape
    parts = triton.cdiv(vocab, sizes.part)

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    groups, members = parts * sizes.part // sizes.group, (rows, parts, sizes.members)
    maxima, sums, states = room(rows, groups), room(rows, parts, SUMS.value), room(rows, dtype=torch.int32)
    picked, listed = room(rows, groups, dtype=torch.int32), room(rows, sizes.listed, dtype=torch.int32)
    chain = (room(*members), room(*members), room(*members, dtype=torch.int32))
    masses, tokens = room(*members), room(rows, sizes.members, dtype=torch.int32)
    settings, plain = (logits, slots, temperatures, top_ks, top_ps, min_ps), (workspace.values, workspace.ids)
    drawn, stride, wide = workspace.parts, logits.stride(0), logits.dtype is torch.float32
    of_draw, of_row = triton.next_power_of_2(drawn), triton.next_power_of_2(parts)
    extra = {"PART": sizes.part, "PDL": pdl} | ({"launch_pdl": True} if pdl else {})
    # Few registers, so that the many programs that have nothing to do come and go quickly.
    _survey_kernel[(parts, rows)](
        *settings, *plain, maxima, sums, vocab, stride, drawn, GROUP=sizes.group, DRAWN=of_draw, num_warps=8, **extra
    )  # fmt: skip
    _narrow_kernel[(parts, rows)](
        *settings, seeds, steps, *plain, sums, states, *chain, vocab, stride, drawn,
        MEMBERS=sizes.members, PARTS=of_row, DRAWN=of_draw, num_warps=16, maxnreg=64, **extra,
    )  # fmt: skip
    _weigh_kernel[(parts, rows)](
        logits, slots, temperatures, top_ps, sums, states, *chain, masses, tokens, vocab, stride,
        MEMBERS=sizes.members, PARTS=of_row, num_warps=8, maxnreg=64, **extra,
    )  # fmt: skip
    _finish_kernel[(rows,)](
        *settings, seeds, steps, *plain, maxima, sums, states, picked, listed, masses, tokens, vocab, stride, drawn, parts,
        GROUP=sizes.group, LIST=sizes.listed, MEMBERS=sizes.members, PARTS=of_row, WIDE=wide, num_warps=16, maxnreg=64, **extra,
    )  # fmt: skip
