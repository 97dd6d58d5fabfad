"""Two arms of a test compared, by intervals that hold whenever somebody looks (see `sequential`).

Rates and ratings are compared by their difference, latencies and speeds by the ratio of their geometric means.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from altiplano.serve.outcomes import QUANTILES, ArmOutcomes, Outcomes, Sums
from altiplano.serve.sequential import Bounded, Interval, Moments, bounded_difference, bounded_mean, mean_difference

Verdict = Literal["better", "worse", "undecided"]


@dataclass(frozen=True)
class Metric:
    """What is compared. `of` gives what is known about an arm: a share, or moments of logarithms; `scale` of a share's range."""

    name: str
    unit: str
    higher_is_better: bool
    of: Callable[[ArmOutcomes], Bounded | Moments | None]
    scale: float = 1.0


@dataclass(frozen=True)
class Comparison:
    """One metric of two arms. `effect` is candidate - baseline, or candidate / baseline for unit "ratio"; with its interval.

    None: too few observations.
    """

    metric: str
    effect_unit: Literal["difference", "ratio"]
    baseline: float | None
    candidate: float | None
    baseline_count: int
    candidate_count: int
    effect: float | None
    interval: Interval | None
    verdict: Verdict


def _share(total: float, count: int) -> Bounded:
    return Bounded(total, count)


def _moments(sums: Sums) -> Moments | None:
    mean, variance = sums.mean, sums.variance
    return None if mean is None or variance is None else Moments(mean, variance, sums.count)


METRICS = (
    Metric("error_rate", "share", False, lambda arm: _share(arm.errors, arm.requests)),
    Metric("ttft_s", "s", False, lambda arm: _moments(arm.ttft)),
    Metric("tokens_per_s", "tokens/s", True, lambda arm: _moments(arm.tokens_per_s)),
    Metric("e2e_s", "s", False, lambda arm: _moments(arm.e2e)),
    # -1 … 1 is a range of 2: ratings are compared as shares of it.
    Metric(
        "feedback", "-1 … 1", True, lambda arm: _share((arm.feedback.total + arm.feedback.count) / 2, arm.feedback.count), 2.0
    ),
)


def compare(outcomes: Outcomes, baseline: str, candidate: str, alpha: float) -> dict[str, Comparison]:
    """Every metric of two arms; each interval on its own holds with probability 1 - alpha, at all looks together."""
    a, b = (outcomes.get(arm, ArmOutcomes()) for arm in (baseline, candidate))
    return {metric.name: _compare(metric, metric.of(a), metric.of(b), alpha) for metric in METRICS}


def report(outcomes: Outcomes, baseline: str, alpha: float) -> dict[str, Any]:
    """All arms, and every other arm against `baseline`; JSON-ready."""
    return {
        "baseline": baseline,
        "confidence": 1 - alpha,
        "arms": {arm: _described(found, alpha) for arm, found in sorted(outcomes.items())},
        "comparisons": {
            arm: {name: asdict(found) for name, found in compare(outcomes, baseline, arm, alpha).items()}
            for arm in sorted(outcomes)
            if arm != baseline
        },
    }


def _compare(metric: Metric, a: Bounded | Moments | None, b: Bounded | Moments | None, alpha: float) -> Comparison:
    counts = (a.count if a else 0, b.count if b else 0)
    if isinstance(a, Moments) and isinstance(b, Moments):
        logs = mean_difference(a, b, alpha)
        interval = None if logs is None else Interval(math.exp(logs.low), math.exp(logs.high))
        values = (math.exp(a.mean), math.exp(b.mean))
        return Comparison(
            metric.name, "ratio", *values, *counts, values[1] / values[0], interval, _verdict(metric, interval, 1.0)
        )
    if isinstance(a, Bounded) and isinstance(b, Bounded) and a.count and b.count:
        found = bounded_difference(a, b, alpha)
        interval = Interval(found.low * metric.scale, found.high * metric.scale)
        shown = (_shown(metric, a.total / a.count), _shown(metric, b.total / b.count))
        return Comparison(
            metric.name, "difference", *shown, *counts, shown[1] - shown[0], interval, _verdict(metric, interval, 0.0)
        )
    kind: Literal["difference", "ratio"] = "difference" if metric.name in ("error_rate", "feedback") else "ratio"
    return Comparison(metric.name, kind, _value(metric, a), _value(metric, b), *counts, None, None, "undecided")


def _verdict(metric: Metric, interval: Interval | None, equal: float) -> Verdict:
    if interval is None or interval.low <= equal <= interval.high:
        return "undecided"
    return "better" if (interval.low > equal) == metric.higher_is_better else "worse"


def _value(metric: Metric, seen: Bounded | Moments | None) -> float | None:
    if seen is None or not seen.count:
        return None
    return math.exp(seen.mean) if isinstance(seen, Moments) else _shown(metric, seen.total / seen.count)


def _shown(metric: Metric, share: float) -> float:
    """A share of the metric's range as users know it."""
    return share * metric.scale - (metric.scale - 1)


def _described(arm: ArmOutcomes, alpha: float) -> dict[str, Any]:
    errors = bounded_mean(Bounded(arm.errors, arm.requests), alpha)
    described: dict[str, Any] = {
        "requests": arm.requests,
        "errors": arm.errors,
        "completion_tokens": arm.tokens,
        "error_rate": arm.errors / arm.requests if arm.requests else None,
        "error_rate_interval": [errors.low, errors.high],
        "feedback": {"count": arm.feedback.count, "mean": arm.feedback.mean},
    }
    named: Mapping[str, Sums] = {"ttft_s": arm.ttft, "tokens_per_s": arm.tokens_per_s, "e2e_s": arm.e2e}
    for name, sums in named.items():
        described[name] = {"geometric_mean": None if sums.mean is None else math.exp(sums.mean)}
        described[name] |= {f"p{q * 100:g}": sums.quantile(q) for q in QUANTILES}
    return described
