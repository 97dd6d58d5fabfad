"""Speculative decoding on the GPU: a request lends its state to a few rows, each of which checks one guess.

    look_up ─► guesses ─┐
    (or a draft model)  ├─► spread ─► decode step of all rows ─► accept
    slot of the request ┘

Row j of a request holds the token at position + j, so one decode step computes the logits behind each guess; each row draws with the
noise that the request would have used there. A guess is right if it is what the row before it has drawn, so guesses change no
token. `accept` moves the request on by the right ones and one more. Nothing here waits for the host.

The text that guesses come from is kept in `history`: int32 [slots, width], the token of each position, written by `note`, `accept`
and, when a request is first guessed, by the host.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from altiplano_kernels.sampling.kernel import RING

MOST = 16  # guesses that a row of `guesses` has places for
BLOCK = 1024


@triton.jit
def _look_up_kernel(
    parents, positions, history, guesses, stride_history, K: tl.constexpr, WIDE: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    parent = tl.load(parents + request)
    text = history + parent.to(tl.int64) * stride_history
    last = tl.load(positions + parent)  # of the last known token
    one = tl.load(text + last)
    two = tl.load(text + tl.maximum(last - 1, 0))
    three = tl.load(text + tl.maximum(last - 2, 0))
    # Where the last words ended before: the latest such place, and three words count more than two.
    best = tl.full((BLOCK,), -1, tl.int32)
    n = tl.arange(0, BLOCK)
    for start in range(1, last, BLOCK):
        at = start + n
        known = at < last
        pair = known & (tl.load(text + at, mask=known, other=-1) == one) & (tl.load(text + at - 1, mask=known, other=-1) == two)
        triple = pair & (at >= 2) & (tl.load(text + at - 2, mask=known & (at >= 2), other=-1) == three)
        best = tl.maximum(best, tl.where(triple, at + (1 << 30), tl.where(pair, at, -1)))
    found = tl.max(best, 0)
    after = (found & ((1 << 30) - 1)) + 1
    j = tl.arange(0, WIDE)
    # A text that ends within the guesses goes on as it did from there on.
    period = tl.maximum(last + 1 - after, 1)
    guess = tl.load(text + after + j % period, mask=found >= 0, other=-1)
    tl.store(guesses + request * MOST + j, tl.where(found >= 0, guess, -1), mask=j < K)


@triton.jit
def _spread_kernel(
    parents, guesses, drafted, tokens, positions, steps, temperatures, seeds, top_ks, top_ps, min_ps, ring, history, tables,
    first_row, stride_history, stride_table, width,
    K: tl.constexpr, BEHIND: tl.constexpr, DRAFT: tl.constexpr, WIDE: tl.constexpr, MOST: tl.constexpr, RING: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    parent = tl.load(parents + request)
    ROWS: tl.constexpr = BEHIND + 1 + K
    first = first_row + request * ROWS
    last, step = tl.load(positions + parent), tl.load(steps + parent)
    row = tl.arange(0, WIDE)
    ahead = row - BEHIND  # of the last known token
    guessed = (ahead > 0) & (row < ROWS)
    if DRAFT:
        # The draft's row drew its guess number n at step + n - 1.
        lane = tl.load(drafted + request)
        guess = tl.load(ring + lane * RING + (step + tl.maximum(ahead, 1) - 1) % RING, mask=guessed, other=-1)
        tl.store(guesses + request * MOST + ahead - 1, guess, mask=guessed)
    else:
        guess = tl.load(guesses + request * MOST + ahead - 1, mask=guessed, other=-1)
    at = tl.maximum(last + ahead, 0)
    known = tl.load(history + parent.to(tl.int64) * stride_history + at, mask=(ahead <= 0) & (row < ROWS), other=0)
    target, inside = first + row, row < ROWS
    tl.store(tokens + target, tl.where(guessed, tl.maximum(guess, 0), known), mask=inside)
    tl.store(positions + target, at, mask=inside)
    tl.store(steps + target, tl.maximum(step + ahead, 0), mask=inside)
    nothing = tl.zeros((WIDE,), tl.int32)
    tl.store(temperatures + target, tl.load(temperatures + parent) + nothing.to(tl.float32), mask=inside)
    tl.store(seeds + target, tl.load(seeds + parent) + nothing.to(tl.int64), mask=inside)
    tl.store(top_ks + target, tl.load(top_ks + parent) + nothing, mask=inside)
    tl.store(top_ps + target, tl.load(top_ps + parent) + nothing.to(tl.float32), mask=inside)
    tl.store(min_ps + target, tl.load(min_ps + parent) + nothing.to(tl.float32), mask=inside)
    n = tl.arange(0, BLOCK)
    for start in range(0, width, BLOCK):
        page = start + n
        pages = tl.load(tables + parent.to(tl.int64) * stride_table + page, mask=page < width, other=0)
        for j in tl.static_range(ROWS):
            tl.store(tables + (first + j).to(tl.int64) * stride_table + page, pages, mask=page < width)


@triton.jit
def _accept_kernel(
    parents, guesses, tokens, positions, steps, ring, history, guessed, first_row, stride_history, width, scratch,
    K: tl.constexpr, MOST: tl.constexpr, RING: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    parent = tl.load(parents + request)
    if parent != scratch:
        first = first_row + request * (K + 1)
        last, step = tl.load(positions + parent), tl.load(steps + parent)
        text = history + parent.to(tl.int64) * stride_history
        right = tl.full((), 1, tl.int32)
        count, made, token = right - 1, right - 1, right - 1
        for j in tl.static_range(K + 1):
            drawn = tl.load(tokens + first + j)
            token = tl.where(right == 1, drawn, token)
            tl.store(ring + parent * RING + (step + j) % RING, drawn, mask=right == 1)
            tl.store(text + last + 1 + j, drawn, mask=(right == 1) & (last + 1 + j < width))
            count += right
            if j < K:
                guess = tl.load(guesses + request * MOST + j)
                made += (guess >= 0).to(tl.int32)
                right = tl.where(drawn == guess, right, 0)
        tl.store(tokens + parent, token)
        tl.store(positions + parent, last + count)
        tl.store(steps + parent, step + count)
        tl.store(guessed + parent, tl.load(guessed + parent) + made)


@triton.jit
def _note_kernel(rows, tokens, positions, history, stride_history, width, PDL: tl.constexpr):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    slot = tl.load(rows + tl.program_id(0))
    at = tl.load(positions + slot)
    tl.store(history + slot.to(tl.int64) * stride_history + at, tl.load(tokens + slot), mask=at < width)


def look_up(
    parents: torch.Tensor, positions: torch.Tensor, history: torch.Tensor, guesses: torch.Tensor, k: int, pdl: bool = False
) -> None:
    """Guess what followed the last three words of each request, or else the last two, where they occurred last; -1 where they did not.

    parents: int32 [requests], their slots; positions: int32 [slots], of the last known tokens; guesses: int32 [requests, MOST], of
    which the first `k` are written.
    """
    extra = {"launch_pdl": True} if pdl else {}
    _look_up_kernel[(len(parents),)](
        parents, positions, history, guesses, history.stride(0), K=k, WIDE=triton.next_power_of_2(k), MOST=MOST, BLOCK=BLOCK, PDL=pdl,
        num_warps=4, **extra,
    )  # fmt: skip


def spread(
    parents: torch.Tensor,
    guesses: torch.Tensor,
    drafted: torch.Tensor | None,
    state: tuple[torch.Tensor, ...],
    history: torch.Tensor,
    tables: torch.Tensor,
    first_row: int,
    k: int,
    behind: int = 0,
    pdl: bool = False,
) -> None:
    """Give each request `behind` + 1 + k rows from slot `first_row` on: its last known tokens, then its guesses.

    parents: int32 [requests], their slots; guesses: int32 [requests, MOST], -1 for none (the row then computes something useless).
    `drafted`: int32 [requests], the slots whose ring holds the guesses; they are copied to `guesses`. `state`: tokens, positions,
    steps, temperatures, seeds, top_ks, top_ps, min_ps and ring, as in `SlotTable`; tables: int32 [slots, pages].
    """
    extra = {"launch_pdl": True} if pdl else {}
    *columns, ring = state
    _spread_kernel[(len(parents),)](
        parents, guesses, parents if drafted is None else drafted, *columns, ring, history, tables,
        first_row, history.stride(0), tables.stride(0), tables.shape[1],
        K=k, BEHIND=behind, DRAFT=drafted is not None, WIDE=triton.next_power_of_2(behind + 1 + k), MOST=MOST, RING=RING, BLOCK=256,
        PDL=pdl, num_warps=4, **extra,
    )  # fmt: skip


def accept(
    parents: torch.Tensor,
    guesses: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    steps: torch.Tensor,
    ring: torch.Tensor,
    history: torch.Tensor,
    guessed: torch.Tensor,
    first_row: int,
    k: int,
    pdl: bool = False,
) -> None:
    """Move each request on by the guesses that its rows, from slot `first_row` on, have drawn as well, and one token more.

    guesses: as `spread` left them; guessed: int32 [slots], counts the guesses that were made. The last slot is scratch and stays.
    """
    extra = {"launch_pdl": True} if pdl else {}
    _accept_kernel[(len(parents),)](
        parents, guesses, tokens, positions, steps, ring, history, guessed, first_row, history.stride(0), history.shape[1],
        tokens.shape[0] - 1, K=k, MOST=MOST, RING=RING, PDL=pdl, num_warps=1, **extra,
    )  # fmt: skip


def note(rows: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor, history: torch.Tensor, pdl: bool = False) -> None:
    """Write the last token of the slots in `rows`: int32 [rows], at its position in `history`."""
    extra = {"launch_pdl": True} if pdl else {}
    _note_kernel[(len(rows),)](
        rows, tokens, positions, history, history.stride(0), history.shape[1], PDL=pdl, num_warps=1, **extra
    )
