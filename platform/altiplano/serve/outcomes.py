"""What became of the requests of each arm, in sums that can be added over replicas and subtracted over time.

Latencies are summed as logarithms: they are skewed, their logarithms are not, and arms are compared by the ratio of their
geometric means. Values outside a fixed range count as its ends, so that one stuck request cannot decide a test.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Protocol

# Seconds, or tokens per second.
LOWEST, HIGHEST = 1e-4, 1e5
# Bounds of the histograms: 20 per decade, so that a quantile is known to 12 %.
STEP = math.log(10) / 20
QUANTILES = (0.5, 0.95, 0.99)


@dataclass
class Sums:
    """count, sum and sum of squares of some values; `bins` counts positive ones by floor(log(value / LOWEST) / STEP)."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    bins: dict[int, int] = field(default_factory=dict)

    def add(self, value: float) -> None:
        """One value as it is."""
        self.count += 1
        self.total += value
        self.squares += value * value

    def add_log(self, value: float) -> None:
        """The logarithm of one positive value, and the value's bin."""
        kept = min(max(value, LOWEST), HIGHEST)
        self.add(math.log(kept))
        place = int(math.log(kept / LOWEST) / STEP)
        self.bins[place] = self.bins.get(place, 0) + 1

    def plus(self, other: "Sums", sign: int = 1) -> "Sums":
        """Both together; with sign -1, what came after `other`."""
        bins = {place: self.bins.get(place, 0) + sign * other.bins.get(place, 0) for place in self.bins | other.bins}
        count = self.count + sign * other.count
        total, squares = self.total + sign * other.total, self.squares + sign * other.squares
        return Sums(count, total, squares, {place: number for place, number in sorted(bins.items()) if number})

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None

    @property
    def variance(self) -> float | None:
        """Of the values seen (divided by count - 1); None for fewer than two."""
        if self.count < 2:
            return None
        return max(0.0, (self.squares - self.total**2 / self.count) / (self.count - 1))

    def quantile(self, q: float) -> float | None:
        """The upper bound of the bin that holds the q-quantile."""
        left = q * sum(self.bins.values())
        for place, number in sorted(self.bins.items()):
            left -= number
            if left <= 0:
                return LOWEST * math.exp((place + 1) * STEP)
        return None


@dataclass
class ArmOutcomes:
    """One arm. `requests` are those that ended (answered or failed) or are late; refusals and clients that left are neither.

    `ttft` and `e2e` in seconds, `tokens_per_s` of one answer after its first token, all as logarithms; `feedback` in -1 … 1.
    """

    requests: int = 0
    errors: int = 0
    tokens: int = 0
    ttft: Sums = field(default_factory=Sums)
    tokens_per_s: Sums = field(default_factory=Sums)
    e2e: Sums = field(default_factory=Sums)
    feedback: Sums = field(default_factory=Sums)

    def plus(self, other: "ArmOutcomes", sign: int = 1) -> "ArmOutcomes":
        """Both together; with sign -1, what came after `other`."""
        merged: dict[str, Any] = {}
        for entry in fields(self):
            mine, theirs = getattr(self, entry.name), getattr(other, entry.name)
            merged[entry.name] = mine.plus(theirs, sign) if isinstance(mine, Sums) else mine + sign * theirs
        return ArmOutcomes(**merged)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ArmOutcomes":
        """The inverse of `to_json`."""
        made: dict[str, Any] = dict(values)
        for entry in fields(cls):
            if isinstance(made[entry.name], Mapping):
                sums = Sums(**made[entry.name])
                made[entry.name] = replace(sums, bins={int(place): number for place, number in sums.bins.items()})
        return cls(**made)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Outcomes = dict[str, ArmOutcomes]


def merged(parts: Iterable[Outcomes]) -> Outcomes:
    """Outcomes of several replicas, or of several stretches of time, together."""
    total: Outcomes = {}
    for part in parts:
        for arm, outcomes in part.items():
            total[arm] = total.get(arm, ArmOutcomes()).plus(outcomes)
    return total


def since(now: Outcomes, before: Outcomes) -> Outcomes:
    """What came after `before`."""
    return {arm: outcomes.plus(before.get(arm, ArmOutcomes()), -1) for arm, outcomes in now.items()}


class Progress(Protocol):
    """How far a request is; times of the recorder's clock."""

    started: float
    first_token: float | None


@dataclass(eq=False)
class Trial:
    """One request of an arm on its way; `counted` once it is in the sums."""

    arm: str
    progress: Progress
    counted: bool = False


class Recorder:
    """The sums of one replica for one test. `late_after_s`: a request without a first token by then has failed, whatever follows."""

    def __init__(self, clock: Callable[[], float], late_after_s: float) -> None:
        self.arms: Outcomes = {}
        self._clock, self._late_after_s = clock, late_after_s
        self._waiting: set[Trial] = set()

    def begin(self, arm: str, progress: Progress) -> Trial:
        """A request that an arm has to answer; `answered`, `failed` or `left` follows."""
        trial = Trial(arm, progress)
        self._waiting.add(trial)
        return trial

    def answered(self, trial: Trial, tokens: int, ended: float) -> None:
        """The answer is complete, with so many tokens."""
        if not self._count(trial):
            return
        outcomes, started, first = self.of(trial.arm), trial.progress.started, trial.progress.first_token
        outcomes.tokens += tokens
        outcomes.e2e.add_log(ended - started)
        if first is None:
            return
        outcomes.ttft.add_log(first - started)
        if tokens > 1 and ended > first:
            outcomes.tokens_per_s.add_log((tokens - 1) / (ended - first))

    def failed(self, trial: Trial) -> None:
        """It was our fault, or the arm's."""
        if self._count(trial):
            self.of(trial.arm).errors += 1

    def left(self, trial: Trial) -> None:
        """The client did not wait for the answer, or should not have asked: nobody's success, nobody's failure."""
        self._waiting.discard(trial)

    def rated(self, arm: str, score: float, before: float | None) -> None:
        """Feedback of -1 … 1; `before` is what the same answer was given earlier."""
        feedback = self.of(arm).feedback
        if before is not None:
            self.of(arm).feedback = feedback = feedback.plus(Sums(1, before, before * before), -1)
        feedback.add(score)

    def snapshot(self) -> Outcomes:
        """The sums until now, late requests among them."""
        late = self._clock() - self._late_after_s
        for trial in [t for t in self._waiting if t.progress.first_token is None and t.progress.started <= late]:
            self.failed(trial)
        return merged([self.arms])

    def of(self, arm: str) -> ArmOutcomes:
        return self.arms.setdefault(arm, ArmOutcomes())

    def _count(self, trial: Trial) -> bool:
        """Count a request once; False when it is in the sums already."""
        self._waiting.discard(trial)
        if trial.counted:
            return False
        trial.counted = True
        self.of(trial.arm).requests += 1
        return True
