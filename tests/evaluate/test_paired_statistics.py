"""Paired statistics against values that can be worked out by hand."""

import pytest

from altiplano.evaluate import statistics
from altiplano.evaluate.compare import compare_rows


def test_mcnemar_is_the_binomial_of_the_rows_that_differ() -> None:
    baseline = [0.0] * 8 + [1.0] * 12
    candidate = [1.0] * 8 + [0.0] * 2 + [1.0] * 10
    p_value, gained, lost = statistics.mcnemar(baseline, candidate)
    assert (gained, lost) == (8, 2)
    assert p_value == pytest.approx(2 * (1 + 10 + 45) / 2**10)


def test_equal_models_prove_nothing() -> None:
    assert statistics.mcnemar([0.0, 1.0], [0.0, 1.0]) == (1.0, 0, 0)
    assert statistics.wilcoxon([0.3, 0.5], [0.3, 0.5]) == 1.0
    interval = statistics.paired_bootstrap([0.3, 0.5], [0.3, 0.5], alpha=0.05, samples=100, seed=0)
    assert (interval.low, interval.high) == (0.0, 0.0)


def test_bootstrap_interval_is_near_the_normal_one_and_repeats_with_its_seed() -> None:
    candidate = [0.0] * 50 + [1.0] * 50
    first = statistics.paired_bootstrap([0.0] * 100, candidate, alpha=0.05, samples=4000, seed=3)
    assert first == statistics.paired_bootstrap([0.0] * 100, candidate, alpha=0.05, samples=4000, seed=3)
    assert first.low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.015)
    assert first.high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.015)


def test_lower_perplexity_is_a_gain() -> None:
    found = compare_rows("perplexity", [2.0, 2.1, 2.2] * 5, [1.0, 1.2, 1.1] * 5, alpha=0.05, bootstrap_samples=500, seed=0)
    assert found.test == "wilcoxon"
    assert found.candidate < found.baseline
    assert found.delta == pytest.approx(1.0)
    assert found.ci_low > 0


def test_other_rows_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="measure both on the same rows"):
        compare_rows("exact_match", [1.0], [1.0, 0.0], alpha=0.05, bootstrap_samples=10, seed=0)
