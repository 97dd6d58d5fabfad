"""How long a step takes, learned while steps run; and how many prompt tokens a step may compute to end in time.

    seconds ≈ base + per_prompt_token * prompt tokens + per_decode * decodes

Fitted to the last steps by least absolute deviations (iteratively reweighted least squares), which one slow step in a few does
not move. Steps with prompt tokens and those without have windows of their own, so that a long time without prompts does not
make it forget what they cost. The first steps of each kind are not counted: they compile, allocate and warm caches.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

WARM_UP, WINDOW, REFIT = 2, 32, 8  # steps: not counted, remembered, between two fits
ROUNDS = 12  # of reweighting
PERCENTILE, HEADROOM = 0.97, 0.95  # aimed at, so that 95 of 100 steps are in time though the line is an estimate
MAX_MARGIN = 3.0
SMALLEST_CHUNK = 16  # tokens of prompts per step, however late it is: every prompt ends


class Step(NamedTuple):
    """What a step computed, and how long it took. Guesses count as decodes: a row each."""

    prompt_tokens: int
    decodes: int
    seconds: float


class Line(NamedTuple):
    """The three coefficients, in seconds; none is negative."""

    base: float
    per_prompt_token: float
    per_decode: float

    def seconds(self, prompt_tokens: float, decodes: float) -> float:
        return self.base + self.per_prompt_token * prompt_tokens + self.per_decode * decodes


class StepTimes:
    """Learns from `observe`; `prompt_limit` answers for the next step."""

    def __init__(self) -> None:
        self._windows: tuple[deque[Step], deque[Step]] = (deque(maxlen=WINDOW), deque(maxlen=WINDOW))
        self._seen = [0, 0]
        self._line: Line | None = None
        self._margin = 1.0

    @property
    def line(self) -> Line | None:
        """None before anything is known about prompts and decodes."""
        return self._line

    def observe(self, step: Step) -> None:
        """Learn from a step that has ended."""
        kind = step.prompt_tokens > 0
        self._seen[kind] += 1
        if self._seen[kind] <= WARM_UP:
            return
        self._windows[kind].append(step)
        if self._line is None or sum(self._seen) % REFIT == 0:
            steps = [*self._windows[0], *self._windows[1]]
            self._line = fit(steps)
            self._margin = margin(self._line, steps)

    def prompt_limit(self, decodes: int, target_s: float) -> int:
        """Prompt tokens that a step beside `decodes` rows may have, so that 95 of 100 such steps end within `target_s`.

        At least SMALLEST_CHUNK. At most twice what was ever seen in the window: a line is not to be trusted far from its points.
        """
        largest = max((step.prompt_tokens for step in self._windows[True]), default=0)
        if self._line is None or not largest:
            return SMALLEST_CHUNK
        left = HEADROOM * target_s / self._margin - self._line.seconds(0, decodes)
        limit = 2 * largest
        if left < self._line.per_prompt_token * limit:
            limit = int(left / self._line.per_prompt_token) if left > 0 else 0
        return max(SMALLEST_CHUNK, limit)


def fit(steps: Sequence[Step]) -> Line:
    """The line with the least sum of absolute errors, as nearly as ROUNDS rounds find it. `steps` must not be empty."""
    weights = [1.0] * len(steps)
    line = Line(0.0, 0.0, 0.0)
    scale = sorted(step.seconds for step in steps)[len(steps) // 2] or 1.0
    for _ in range(ROUNDS):
        line = _least_squares(steps, weights, scale)
        errors = [abs(step.seconds - line.seconds(step.prompt_tokens, step.decodes)) for step in steps]
        weights = [1.0 / max(error / scale, 1e-3) for error in errors]
    return line


def margin(line: Line, steps: Sequence[Step]) -> float:
    """By which factor the slowest steps but 3 in 100 take longer than `line` says; between 1 and MAX_MARGIN."""
    ratios = sorted(step.seconds / max(line.seconds(step.prompt_tokens, step.decodes), 1e-9) for step in steps)
    return min(max(1.0, ratios[min(len(ratios) - 1, int(PERCENTILE * len(ratios)))]), MAX_MARGIN)


def _least_squares(steps: Sequence[Step], weights: Sequence[float], scale: float) -> Line:
    """Weighted, without negative coefficients: of all subsets of the three columns, the best whose coefficients are not negative."""
    widest = max(1, max(step.prompt_tokens for step in steps)), max(1, max(step.decodes for step in steps))
    rows = [(1.0, step.prompt_tokens / widest[0], step.decodes / widest[1], step.seconds / scale) for step in steps]
    products = [[sum(w * row[i] * row[j] for w, row in zip(weights, rows, strict=True)) for j in range(4)] for i in range(4)]
    best, best_gain = [0.0, 0.0, 0.0], -1.0
    for columns in ((0, 1, 2), (0, 1), (0, 2), (1, 2), (0,), (1,), (2,)):
        found = _solve([[products[i][j] for j in (*columns, 3)] for i in columns])
        if found is None or min(found) < 0:
            continue
        # What these columns take off the squares of the target.
        gain = sum(x * products[i][3] for x, i in zip(found, columns, strict=True))
        if gain > best_gain + 1e-12:
            best, best_gain = [0.0, 0.0, 0.0], gain
            for x, i in zip(found, columns, strict=True):
                best[i] = x
    return Line(best[0] * scale, best[1] * scale / widest[0], best[2] * scale / widest[1])


def _solve(rows: list[list[float]]) -> list[float] | None:
    """Gauss-Jordan on an augmented matrix; None when it is (nearly) singular."""
    n = len(rows)
    rows = [list(row) for row in rows]
    size = max(abs(rows[i][i]) for i in range(n))
    for i in range(n):
        pivot = max(range(i, n), key=lambda r: abs(rows[r][i]))
        if abs(rows[pivot][i]) <= 1e-9 * size:
            return None
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for r in range(n):
            if r != i:
                rows[r] = [x - rows[r][i] * y for x, y in zip(rows[r], rows[i], strict=True)]
    return [row[n] for row in rows]
