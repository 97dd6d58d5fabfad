"""Candidate against a rival, task by task."""

from dataclasses import dataclass
from typing import Literal

from altiplano.evaluate import statistics
from altiplano.evaluate.measure import Scores
from altiplano.evaluate.tasks import LOWER_IS_BETTER


@dataclass(frozen=True)
class Comparison:
    """One task. Values are means over rows; `delta` and its interval are gains: above zero the candidate is better."""

    task: str
    test: Literal["mcnemar", "wilcoxon"]
    n: int
    baseline: float
    candidate: float
    delta: float
    ci_low: float
    ci_high: float
    p_value: float
    gained: int
    lost: int


def compare(candidate: Scores, rival: Scores, *, alpha: float, bootstrap_samples: int, seed: int) -> dict[str, Comparison]:
    """Every task that both were measured on, over the same rows."""
    shared = [task for task in candidate.rows if task in rival.rows]
    return {
        task: compare_rows(
            task, rival.rows[task], candidate.rows[task], alpha=alpha, bootstrap_samples=bootstrap_samples, seed=seed
        )
        for task in shared
    }


def compare_rows(
    task: str, baseline: list[float], candidate: list[float], *, alpha: float, bootstrap_samples: int, seed: int
) -> Comparison:
    """0/1 outcomes by McNemar's exact test, scores by Wilcoxon's; the interval is a paired bootstrap's.

    Raises:
        ValueError: the two were measured on different rows.
    """
    if len(baseline) != len(candidate):
        raise ValueError(f"{task}: {len(baseline)} and {len(candidate)} rows cannot be paired: measure both on the same rows")
    sign = -1.0 if task in LOWER_IS_BETTER else 1.0
    before, after = [sign * v for v in baseline], [sign * v for v in candidate]
    binary = set(baseline) | set(candidate) <= {0.0, 1.0}
    interval = statistics.paired_bootstrap(before, after, alpha=alpha, samples=bootstrap_samples, seed=seed)
    p_value, gained, lost = statistics.mcnemar(before, after)
    if not binary:
        p_value = statistics.wilcoxon(before, after)
    mean_before, mean_after = sum(baseline) / len(baseline), sum(candidate) / len(candidate)
    return Comparison(
        task=task,
        test="mcnemar" if binary else "wilcoxon",
        n=len(baseline),
        baseline=mean_before,
        candidate=mean_after,
        delta=sign * (mean_after - mean_before),
        ci_low=interval.low,
        ci_high=interval.high,
        p_value=p_value,
        gained=gained,
        lost=lost,
    )
