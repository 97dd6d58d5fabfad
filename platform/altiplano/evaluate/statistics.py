"""Paired statistics: two models on the same rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float


def mcnemar(baseline: Sequence[float], candidate: Sequence[float]) -> tuple[float, int, int]:
    """Exact two-sided McNemar test for 0/1 outcomes: (p value, rows that only the candidate gets right, only the baseline).

    Rows on which both agree say nothing; of the others each side wins half by chance (McNemar, 1947, in its binomial form).
    """
    gained = sum(c > b for b, c in zip(baseline, candidate, strict=True))
    lost = sum(c < b for b, c in zip(baseline, candidate, strict=True))
    if gained + lost == 0:
        return 1.0, 0, 0
    return float(stats.binomtest(gained, gained + lost, 0.5).pvalue), gained, lost


def wilcoxon(baseline: Sequence[float], candidate: Sequence[float]) -> float:
    """Two-sided p value of the signed-rank test for scores; 1 when all rows are equal."""
    differences = np.asarray(candidate) - np.asarray(baseline)
    if not differences.any():
        return 1.0
    return float(stats.wilcoxon(differences).pvalue)


def paired_bootstrap(baseline: Sequence[float], candidate: Sequence[float], *, alpha: float, samples: int, seed: int) -> Interval:
    """Percentile interval of level 1 - alpha for the mean of candidate - baseline, by resampling rows (Efron, 1979)."""
    differences = np.asarray(candidate, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    generator = np.random.default_rng(seed)
    # Resampling rows is drawing how often each row occurs: memory stays small for many rows.
    counts = generator.multinomial(len(differences), np.full(len(differences), 1 / len(differences)), size=samples)
    means = counts @ differences / len(differences)
    low, high = np.quantile(means, (alpha / 2, 1 - alpha / 2))
    return Interval(float(low), float(high))
