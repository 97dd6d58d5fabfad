"""Where the time of steps goes: a record of each of the last steps, and histograms over all of them.

The time in which requests are there divides into steps (the device computes), guesses (a proposer works) and gaps (the device has
nothing to do, because the host has not told it yet):

    ▓▓▓▓ step ▓▓▓▓│ gap │guesses│▓▓▓▓ step ▓▓▓▓│ gap │ …

An engine books each step with one call of `add`, which must cost next to nothing: it makes a tuple, and objects only for who reads.
"""

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from itertools import islice

REMEMBERED = 1024
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)  # vLLM's bounds
ROWS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# A 1B model takes half a millisecond at batch 1 on a GPU, a laptop half a second for a long prompt.
SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
GAP_SECONDS = (0.00001, 0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step, or a burst of `steps` equal ones that were launched together."""

    number: int  # of the (last) step, from 1
    ended: float  # seconds of the engine's clock
    steps: int
    decodes: int  # requests that computed one token
    prompt_tokens: int  # computed tokens of prompts, or of answers that are computed again
    generated_tokens: int
    cached_tokens: int  # prompt tokens that requests of this step found in the prefix cache, with their first token
    guessed_tokens: int
    accepted_tokens: int
    kv_cache_usage: float  # share of pages that requests or cached prefixes hold, after it
    seconds: float  # the device computed
    draft_seconds: float  # guesses were made before
    gap_seconds: float  # the device had nothing to do since the step before, while requests were there


@dataclass(frozen=True, slots=True)
class Histogram:
    """`counts[i]` values were at most `bounds[i]` and above the bound before; the last count is of those above all bounds."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


class _Counts:
    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float, times: int) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def read(self) -> Histogram:
        return Histogram(self.bounds, tuple(self.counts), self.total)


class StepLog:
    """The last REMEMBERED steps, and histograms of all. Times are seconds of one clock that only goes forward."""

    def __init__(self) -> None:
        self._rows: deque[tuple[float, ...]] = deque(maxlen=REMEMBERED)
        self._tokens, self._decodes = _Counts(TOKENS), _Counts(ROWS)
        self._seconds, self._gaps = _Counts(SECONDS), _Counts(GAP_SECONDS)
        self._busy_until: float | None = None
        self._number = 0

    def idle(self) -> None:
        """Nobody was there until now: what comes next has not been waited for."""
        self._busy_until = None

    def add(
        self,
        started: float,
        ended: float,
        decodes: int,
        prompt_tokens: int,
        generated: int,
        kv_cache_usage: float,
        cached: int = 0,
        guessed: int = 0,
        accepted: int = 0,
        drafting: float = 0.0,
        steps: int = 1,
    ) -> None:
        """Book work that the device did from `started` (launched) to `ended` (known to be done).

        Work that was launched before the last one had ended begins when that ends, so seconds are never counted twice. `drafting`:
        seconds of making guesses for it, before `started`.
        """
        before = self._busy_until
        if before is None:
            before = started - drafting
        begun = started if started > before else before
        gap = begun - before - drafting
        if gap < 0.0:
            gap = 0.0
        seconds = ended - begun
        self._busy_until = ended
        self._number += steps
        self._rows.append(
            (
                self._number,
                ended,
                steps,
                decodes,
                prompt_tokens,
                generated,
                cached,
                guessed,
                accepted,
                kv_cache_usage,
                seconds,
                drafting,
                gap,
            )
        )
        self._tokens.add((prompt_tokens + generated) / steps, steps)
        self._decodes.add(decodes, steps)
        self._seconds.add(seconds / steps, steps)
        self._gaps.add(gap, 1)

    def last(self, most: int = REMEMBERED) -> list[StepRecord]:
        """The last steps, oldest first."""
        return [StepRecord(*row) for row in islice(self._rows, max(0, len(self._rows) - most), None)]  # type: ignore[arg-type]

    def histograms(self) -> dict[str, Histogram]:
        """Of all steps: tokens (of prompts and generated), rows that decode, seconds; and of the gap before each launch."""
        found = {
            "iteration_tokens_total": self._tokens,
            "iteration_decode_seqs": self._decodes,
            "iteration_seconds": self._seconds,
            "iteration_gap_seconds": self._gaps,
        }
        return {name: counts.read() for name, counts in found.items()}
