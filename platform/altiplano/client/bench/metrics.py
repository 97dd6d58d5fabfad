"""From records to numbers, under vLLM's names and with its formulas.

    ttft   first text − request sent
    tpot   (e2el − ttft) / (output tokens − 1); requests with one token have none
    itl    gaps between chunks with text, of all requests together
    e2el   last chunk − request sent

vLLM's clock starts when a request is sent, so with --max-concurrency it does not see the time for which the client itself held
the request back. That time is `queue` here, and `arrival_ttft` and `arrival_e2el` count from the scheduled arrival. Goodput is
judged from the arrival: a user does not care who made him wait.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from altiplano.client.bench.load import Record
from altiplano.client.bench.quantiles import percentile

METRICS = ("ttft", "tpot", "itl", "e2el", "queue", "arrival_ttft", "arrival_e2el")
OBJECTIVES = ("ttft", "tpot", "e2el")


@dataclass(frozen=True)
class Series:
    """Values of one metric in milliseconds."""

    name: str
    values: list[float]


def series(records: Sequence[Record]) -> list[Series]:
    """Every metric of the requests that were answered."""
    good = [record for record in records if record.error is None]
    found: dict[str, list[float]] = {
        "ttft": [record.first - record.started for record in good],
        "tpot": [_tpot(record) for record in good if record.output_tokens > 1],
        "itl": [after - before for record in good for before, after in pairwise(record.pieces)],
        "e2el": [record.ended - record.started for record in good],
        "queue": [record.started - record.scheduled for record in good],
        "arrival_ttft": [record.first - record.scheduled for record in good],
        "arrival_e2el": [record.ended - record.scheduled for record in good],
    }
    return [Series(name, [value * 1e3 for value in found[name]]) for name in METRICS]


def summary(
    records: Sequence[Record], percentiles: Sequence[float], goodput: dict[str, float] | None = None
) -> dict[str, float | int | None]:
    """The numbers of one load: counts, rates per second, and each metric's mean, median, std (population) and percentiles.

    `goodput` maps ttft, tpot, e2el to milliseconds. A failed request counts in `failed` and in no latency.
    """
    good = [record for record in records if record.error is None]
    duration = max((record.ended for record in records), default=0.0)
    inputs, outputs = sum(record.prompt_tokens for record in good), sum(record.output_tokens for record in good)
    per_second = 1.0 / duration if duration else 0.0
    found: dict[str, float | int | None] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(records) - len(good),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(good) * per_second,
        "request_goodput": sum(_is_good(record, goodput) for record in good) * per_second if goodput else None,
        "output_throughput": outputs * per_second,
        "total_token_throughput": (inputs + outputs) * per_second,
        "max_output_tokens_per_s": max(tokens_over_time(good, 1.0), default=0.0),
        "max_concurrent_requests": max((count for _, count in concurrency_over_time(good)), default=0),
        "counted_by_chunks": sum(not record.has_usage for record in good),
        "max_schedule_lag_ms": max((record.released - record.scheduled for record in records), default=0.0) * 1e3,
    }
    for one in series(records):
        found |= _statistics(one, percentiles)
    return found


def parse_goodput(objectives: Sequence[str]) -> dict[str, float]:
    """Objectives such as `ttft:500 tpot:50`, in milliseconds, in one text or several."""
    found = {}
    for objective in re.split(r"[\s,]+", " ".join(objectives).strip()):
        name, colon, value = objective.partition(":")
        try:
            found[name] = float(value)
        except ValueError:
            colon = ""
        if not colon or name not in OBJECTIVES or not found[name] > 0:
            raise ValueError(f"--goodput {objective!r}: write one of {', '.join(OBJECTIVES)} with milliseconds, such as ttft:500")
    return found


def tokens_over_time(records: Sequence[Record], bucket_s: float) -> list[float]:
    """Output tokens in each bucket of time. A chunk stands for its share of the request's tokens."""
    buckets = [0.0] * (int(max((record.ended for record in records), default=0.0) / bucket_s) + 1)
    for record in records:
        for time in record.pieces:
            buckets[int(time / bucket_s)] += record.output_tokens / len(record.pieces)
    return buckets


def concurrency_over_time(records: Sequence[Record]) -> list[tuple[float, int]]:
    """(time, requests in flight) at every change. A request that ends when another starts does not overlap it."""
    changes = sorted([(record.started, 1) for record in records] + [(record.ended, -1) for record in records])
    steps, running = [], 0
    for time, change in changes:
        running += change
        steps.append((time, running))
    return steps


def _tpot(record: Record) -> float:
    return (record.ended - record.first) / (record.output_tokens - 1) if record.output_tokens > 1 else 0.0


def _is_good(record: Record, objectives: dict[str, float]) -> bool:
    seen = {"ttft": record.first - record.scheduled, "tpot": _tpot(record), "e2el": record.ended - record.scheduled}
    return all(seen[name] * 1e3 <= bound for name, bound in objectives.items())


def _statistics(one: Series, percentiles: Sequence[float]) -> dict[str, float | int | None]:
    ordered = sorted(one.values)
    names = ["mean", "median", "std", *(f"p{p:g}" for p in percentiles)]
    if not ordered:
        return {f"{name}_{one.name}_ms": None for name in names}
    mean = math.fsum(ordered) / len(ordered)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in ordered) / len(ordered))
    values = [mean, percentile(ordered, 50), std, *(percentile(ordered, p) for p in percentiles)]
    return {f"{name}_{one.name}_ms": value for name, value in zip(names, values, strict=True)}
