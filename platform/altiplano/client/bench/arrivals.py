"""When requests arrive. The times are drawn before the load starts and never wait for answers (open loop)."""

import math
import random
from enum import StrEnum


class RampUp(StrEnum):
    """How the rate grows from the first request to the last."""

    linear = "linear"
    exponential = "exponential"


def schedule(count: int, rate: float, burstiness: float, rng: random.Random) -> list[float]:
    """Arrival times of `count` requests in seconds from the start, `rate` requests per second; inf: all at once.

    Gaps are gamma-distributed with shape `burstiness` and mean 1/rate: 1 is a Poisson process, below 1 comes in bursts, above 1
    is more regular, inf is a metronome. As in vLLM, times are scaled so that the drawn rate is the asked rate.
    """
    _positive(rate, burstiness)
    if math.isinf(rate):
        return [0.0] * count
    times = _sums([_gap(rate, burstiness, rng) for _ in range(count)])
    scale = count / rate / times[-1] if count else 1.0
    return [time * scale for time in times]


def ramp(count: int, start: float, end: float, strategy: RampUp, burstiness: float, rng: random.Random) -> list[float]:
    """Arrival times while the rate goes from `start` to `end` requests per second. Not scaled."""
    _positive(start, burstiness)
    _positive(end, burstiness)
    gaps = []
    for index in range(count):
        done = index / max(1, count - 1)
        rate = start + (end - start) * done if strategy is RampUp.linear else start * (end / start) ** done
        gaps.append(_gap(rate, burstiness, rng))
    return _sums(gaps)


def _gap(rate: float, burstiness: float, rng: random.Random) -> float:
    return 1.0 / rate if math.isinf(burstiness) else rng.gammavariate(burstiness, 1.0 / (rate * burstiness))


def _sums(gaps: list[float]) -> list[float]:
    times, now = [], 0.0
    for gap in gaps:
        now += gap
        times.append(now)
    return times


def _positive(rate: float, burstiness: float) -> None:
    if not rate > 0 or not burstiness > 0:
        raise ValueError(f"request rate and burstiness must be above 0, not {rate:g} and {burstiness:g}")
