"""The time to the first token of late: a percentile of what a Prometheus histogram has counted within a window."""

from collections import deque
from collections.abc import Iterable, Mapping

from prometheus_client import Metric

Buckets = Mapping[float, float]  # upper bound in seconds -> observations at or below it


class RecentPercentile:
    """A percentile over the last `window_s` seconds, from snapshots of a histogram's cumulative buckets."""

    def __init__(self, share: float, window_s: float) -> None:
        self._share, self._window_s = share, window_s
        self._snapshots: deque[tuple[float, Buckets]] = deque()

    def update(self, buckets: Buckets, now: float) -> float:
        """The percentile in seconds, at most one bucket too high; 0 when nothing was observed. `now`: any monotonic clock."""
        while len(self._snapshots) > 1 and now - self._snapshots[1][0] >= self._window_s:
            self._snapshots.popleft()
        before = self._snapshots[0][1] if self._snapshots else {}
        self._snapshots.append((now, buckets))
        counts = {bound: count - before.get(bound, 0.0) for bound, count in sorted(buckets.items())}
        total = max(counts.values(), default=0.0)
        if total <= 0:
            return 0.0
        finite = [bound for bound in counts if bound != float("inf")]
        return next((bound for bound in finite if counts[bound] >= self._share * total), finite[-1])


def cumulative_buckets(metrics: Iterable[Metric]) -> Buckets:
    """The buckets of one histogram, all labels together."""
    found: dict[float, float] = {}
    for metric in metrics:
        for sample in metric.samples:
            if sample.name.endswith("_bucket"):
                bound = float(sample.labels["le"])
                found[bound] = found.get(bound, 0.0) + sample.value
    return found
