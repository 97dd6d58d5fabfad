"""Confidence sequences: intervals that stay valid however often and whenever somebody looks.

A test martingale E(theta) starts at 1 and has expectation 1 under the true theta, so by Ville's inequality it ever exceeds 1 / alpha
with probability alpha at most. The thetas with E(theta) <= 1 / alpha form a confidence set at every moment at once. For two arms the
product of both martingales is one again, over the order in which requests happened to arrive: the joint set
{(a, b): E_a(a) E_b(b) <= 1 / alpha} holds whatever the shares of traffic are, and the interval of the difference is its shadow.

Sources: Robbins (1970), Statistical methods related to the law of the iterated logarithm; Johari, Koomen, Pekelis and Walsh (2022),
Always valid inference; Howard, Ramdas, McAuliffe and Sekhon (2021), Time-uniform, nonparametric, nonasymptotic confidence sequences;
Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas (2024), Time-uniform central limit theory and asymptotic confidence sequences.
"""

import math
from dataclasses import dataclass

from scipy.optimize import brentq, minimize_scalar
from scipy.special import betaln, xlog1py, xlogy

PRIOR = 0.5  # Jeffreys: narrow near 0 and 1, where error rates are
# The normal mixture is narrowest around this many observations per arm; elsewhere it is a little wider.
NARROWEST_AT = 300
# Below this many, an estimated variance says too little for a normal approximation.
MIN_COUNT = 30


@dataclass(frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Bounded:
    """Sum and number of observations in 0 … 1; for events, how many happened."""

    total: float
    count: int


@dataclass(frozen=True)
class Moments:
    """Mean, variance and number of observations."""

    mean: float
    variance: float
    count: int


def bounded_mean(seen: Bounded, alpha: float) -> Interval:
    """Interval for the mean of observations in 0 … 1, exact for any number of them.

    E(p) is a Bernoulli likelihood ratio mixed over Beta(1/2, 1/2). By the inequality of the arithmetic and geometric mean its factors
    have expectation at most 1 for every distribution on [0, 1] with mean p, not just for events.
    """
    return _level_set(seen, math.log(1 / alpha))


def bounded_difference(a: Bounded, b: Bounded, alpha: float) -> Interval:
    """Interval for mean(b) - mean(a), exact for any number of observations."""
    high = _largest_gap(a, b, alpha)
    low = -_largest_gap(b, a, alpha)
    return Interval(low, high)


def mean_difference(a: Moments, b: Moments, alpha: float) -> Interval | None:
    """Interval for mean(b) - mean(a) by normal mixtures with estimated variances; None before MIN_COUNT observations of each.

    log E(mu) = n² rho² (mean - mu)² / (2 variance (n rho² + 1)) - log(n rho² + 1) / 2, and the joint set is an ellipse.
    """
    if min(a.count, b.count) < MIN_COUNT:
        return None
    level = math.log(1 / alpha) + sum(math.log(arm.count * _rho2(alpha) + 1) / 2 for arm in (a, b))
    spread = sum(_spread(arm, alpha) for arm in (a, b))
    half = math.sqrt(level * spread)
    return Interval(b.mean - a.mean - half, b.mean - a.mean + half)


def _spread(arm: Moments, alpha: float) -> float:
    """What (mean - mu)² is divided by in log E."""
    shrunk = arm.count * _rho2(alpha)
    return 2 * arm.variance * (shrunk + 1) / (arm.count * shrunk)


def _rho2(alpha: float) -> float:
    """The mixture's variance that makes the sequence narrowest at NARROWEST_AT (Waudby-Smith et al., appendix B.2)."""
    wanted = -2 * math.log(alpha)
    return (wanted + math.log(wanted + 1)) / NARROWEST_AT


def _log_martingale(seen: Bounded, p: float) -> float:
    happened, missed = seen.total, seen.count - seen.total
    mixed = betaln(happened + PRIOR, missed + PRIOR) - betaln(PRIOR, PRIOR)
    return float(mixed - xlogy(happened, p) - xlog1py(missed, -p))


def _least(seen: Bounded) -> float:
    """The smallest value of the log martingale, at the observed mean."""
    return _log_martingale(seen, seen.total / seen.count) if seen.count else 0.0


def _level_set(seen: Bounded, level: float) -> Interval:
    """All p with a log martingale of at most `level`. It is convex in p, so they are an interval."""
    if not seen.count:
        return Interval(0.0, 1.0)
    middle, tiny = seen.total / seen.count, 1e-12

    def above(p: float) -> float:
        return _log_martingale(seen, p) - level

    low = 0.0 if above(tiny) <= 0 or middle <= tiny else float(brentq(above, tiny, middle)) if above(middle) < 0 else middle
    high = (
        1.0
        if above(1 - tiny) <= 0 or middle >= 1 - tiny
        else float(brentq(above, middle, 1 - tiny))
        if above(middle) < 0
        else middle
    )
    return Interval(low, high)


def _largest_gap(a: Bounded, b: Bounded, alpha: float) -> float:
    """The largest mean(b) - mean(a) within the joint set: how to divide the level between both is a concave problem."""
    level, least_a, least_b = math.log(1 / alpha), _least(a), _least(b)

    def gap(part: float) -> float:
        return _level_set(b, level - part).high - _level_set(a, part).low

    # Outside of these parts one of both sets is empty.
    found = minimize_scalar(lambda part: -gap(part), bounds=(least_a, level - least_b), method="bounded", options={"xatol": 1e-6})
    return min(1.0, float(-found.fun))
