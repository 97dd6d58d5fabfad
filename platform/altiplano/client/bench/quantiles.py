"""Percentiles, without numpy."""

import math
from collections.abc import Sequence


def percentile(ordered: Sequence[float], p: float) -> float:
    """The p-th percentile of sorted values, between neighbours by linear interpolation (numpy's default)."""
    place = (len(ordered) - 1) * p / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
