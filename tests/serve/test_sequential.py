"""Confidence sequences hold at every look, and are narrow enough to be of use."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import betaln, xlog1py, xlogy

from altiplano.serve.sequential import (
    MIN_COUNT,
    Bounded,
    Interval,
    Moments,
    bounded_difference,
    bounded_mean,
    mean_difference,
)

ALPHA = 0.1


def log_martingale(total: np.ndarray, count: np.ndarray, p: np.ndarray) -> np.ndarray:
    """The textbook formula, over whole paths at once."""
    mixed = betaln(total + 0.5, count - total + 0.5) - betaln(0.5, 0.5)
    return np.asarray(mixed - xlogy(total, p) - xlog1py(count - total, -p))


def test_looking_after_every_request_finds_a_difference_of_equal_error_rates_no_more_often_than_alpha() -> None:
    rng = np.random.default_rng(0)
    runs, steps, p = 2000, 1500, 0.03
    b = rng.random((runs, steps)) < 0.2  # which arm a request goes to
    happened = rng.random((runs, steps)) < p
    count_b, count_a = b.cumsum(1), (~b).cumsum(1)
    total_b, total_a = (happened & b).cumsum(1), (happened & ~b).cumsum(1)
    # 0 is outside the interval exactly when no common p is in the joint set; the best candidate is the pooled rate.
    pooled = (total_a + total_b) / (count_a + count_b)
    excluded = log_martingale(total_a, count_a, pooled) + log_martingale(total_b, count_b, pooled) > math.log(1 / ALPHA)
    wrong = excluded.any(1).mean()
    assert wrong <= ALPHA
    # The vectorised shortcut above is about the function under test.
    for run, step in ((i, j) for i in range(6) for j in (5, 80, 1499)):
        a, seen_b = (Bounded(int(t[run, step]), int(c[run, step])) for t, c in ((total_a, count_a), (total_b, count_b)))
        found = bounded_difference(a, seen_b, ALPHA)
        assert (not found.low <= 0 <= found.high) == excluded[run, step]


@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_looking_after_every_request_finds_a_difference_of_equal_latencies_no_more_often_than_alpha(sigma: float) -> None:
    rng = np.random.default_rng(1)
    runs, steps = 400, 900
    wrong = 0
    for _ in range(runs):
        # Logarithms of latencies that have a second, slow mode: far from normal.
        values = rng.normal(0, sigma, steps) + 1.5 * (rng.random(steps) < 0.05)
        b = rng.random(steps) < 0.25
        wrong += any(not found.low <= 0 <= found.high for found in _peeks(values, b))
    assert wrong / runs <= ALPHA


def _peeks(values: np.ndarray, b: np.ndarray) -> list[Interval]:
    found = []
    sums = {arm: [np.cumsum((b == arm) * values**k) for k in (0, 1, 2)] for arm in (False, True)}
    for step in range(len(values)):
        moments = []
        for arm in (False, True):
            count, total, squares = (float(s[step]) for s in sums[arm])
            if count >= MIN_COUNT:
                moments.append(Moments(total / count, (squares - total**2 / count) / (count - 1), int(count)))
        if len(moments) == 2:
            interval = mean_difference(moments[0], moments[1], ALPHA)
            assert interval is not None
            found.append(interval)
    return found


def test_a_test_that_is_not_made_for_peeking_fails_the_same_simulation() -> None:
    rng = np.random.default_rng(2)
    happened = rng.random((2000, 1500)) < 0.3
    count = np.arange(1, 1501)
    rate = happened.cumsum(1) / count
    z = np.abs(rate - 0.3) / np.sqrt(0.3 * 0.7 / count)
    assert (z[:, 30:] > 1.645).any(1).mean() > 2 * ALPHA


@settings(deadline=None)
@given(st.integers(0, 400), st.integers(1, 400), st.floats(0.001, 0.5))
def test_the_interval_of_a_mean_holds_what_was_seen_and_its_ends_are_on_the_level(happened: int, more: int, alpha: float) -> None:
    seen = Bounded(happened, happened + more)
    found = bounded_mean(seen, alpha)
    rate = happened / (happened + more)
    assert 0 <= found.low <= rate <= found.high <= 1
    for end in (found.low, found.high):
        if 1e-9 < end < 1 - 1e-9:
            level = log_martingale(np.array(seen.total), np.array(seen.count), np.array(end))
            assert float(level) == pytest.approx(math.log(1 / alpha), abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 50), st.integers(1, 300), st.integers(0, 50), st.integers(1, 300))
def test_the_interval_of_a_difference_is_the_shadow_of_the_joint_set(a: int, more_a: int, b: int, more_b: int) -> None:
    one, two = Bounded(a, a + more_a), Bounded(b, b + more_b)
    found = bounded_difference(one, two, 0.05)
    grid = np.linspace(0.0005, 0.9995, 400)
    inside = (
        log_martingale(np.array(one.total), np.array(one.count), grid)[:, None]
        + log_martingale(np.array(two.total), np.array(two.count), grid)[None, :]
    ) <= math.log(20)
    gaps = (grid[None, :] - grid[:, None])[inside]
    if gaps.size:
        assert found.low <= gaps.min() + 1e-4 and gaps.max() - 1e-4 <= found.high
        assert found.high - gaps.max() < 0.006 and gaps.min() - found.low < 0.006
    mirrored = bounded_difference(two, one, 0.05)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low), abs=1e-6)


def test_a_broken_arm_is_found_within_a_few_requests_and_a_small_loss_within_thousands() -> None:
    assert bounded_difference(Bounded(0, 100), Bounded(4, 5), 0.05).low > 0.05
    assert bounded_difference(Bounded(30, 3000), Bounded(90, 3000), 0.05).low > 0
    assert bounded_difference(Bounded(0, 0), Bounded(5, 5), 0.05).low < 0
    slower = mean_difference(Moments(0.0, 0.25, 300), Moments(math.log(1.5), 0.25, 2 * MIN_COUNT), 0.05)
    assert slower is not None and slower.low > 0
    assert mean_difference(Moments(0.0, 0.25, 300), Moments(3.0, 0.25, MIN_COUNT - 1), 0.05) is None
