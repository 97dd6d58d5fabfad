"""The result file: one JSON object with vLLM's keys, and what a reader needs to believe it."""

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import pairwise
from statistics import median
from typing import Any

from altiplano import __version__
from altiplano.client.bench.load import Record, Run
from altiplano.client.bench.metrics import summary
from altiplano.client.bench.plan import Plan

SPREAD = (
    "request_throughput",
    "output_throughput",
    "total_token_throughput",
    "median_ttft_ms",
    "median_tpot_ms",
    "median_e2el_ms",
)


def result(
    plan: Plan,
    runs: Sequence[Run],
    percentiles: Sequence[float],
    goodput: dict[str, float] | None,
    command: Sequence[str],
    metadata: dict[str, str | None],
) -> dict[str, Any]:
    """The run with the median output throughput in vLLM's flat keys; `repetitions` holds all of them, `spread` their ranges."""
    numbers = [{**summary(run.records, percentiles, goodput), **_client(run)} for run in runs]
    chosen = median_run(runs)
    arrivals = plan.arrivals
    return {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": str(plan.backend),
        "backend": str(plan.backend),
        "label": None,
        "model_id": plan.model,
        "tokenizer_id": None,
        "num_prompts": plan.num_prompts,
        "request_rate": "inf" if math.isinf(arrivals.request_rate) else arrivals.request_rate,
        "burstiness": arrivals.burstiness,
        "max_concurrency": arrivals.max_concurrency,
        **numbers[chosen],
        "goodput_objectives_ms": goodput,
        "repetitions": numbers if len(runs) > 1 else None,
        "spread": {key: _range([one[key] for one in numbers]) for key in SPREAD},
        "errors_seen": _counted([record.error for run in runs for record in run.records if record.error is not None]),
        "dataset": {key: str(value) if value is not None else None for key, value in asdict(plan.data).items()},
        "lora_modules": list(plan.lora_modules),
        "seed": plan.seed,
        "num_warmups": plan.num_warmups,
        "processes": plan.processes,
        "request_fields": plan.fields,
        "client": {
            "altiplano": __version__,
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
            "command": list(command),
        },
        **metadata,
    }


def details(records: Sequence[Record]) -> dict[str, Any]:
    """vLLM's lists, one entry per request, times in seconds; empty for requests that failed."""
    good = [record.error is None for record in records]
    return {
        "input_lens": [record.prompt_tokens for record in records],
        "output_lens": [record.output_tokens for record in records],
        "start_times": [record.started for record in records],
        "arrival_times": [record.scheduled for record in records],
        "ttfts": [record.first - record.started if ok else 0.0 for record, ok in zip(records, good, strict=True)],
        "itls": [[after - before for before, after in pairwise(record.pieces)] for record in records],
        "generated_texts": [record.text for record in records],
        "errors": [record.error or "" for record in records],
    }


def median_run(runs: Sequence[Run]) -> int:
    """Which run stands for all: the one with the (lower) median output throughput."""
    order = sorted(range(len(runs)), key=lambda i: summary(runs[i].records, ())["output_throughput"] or 0.0)
    return order[(len(order) - 1) // 2]


def _client(run: Run) -> dict[str, float]:
    return {"client_cpu_share": run.cpu_share, "client_loop_lag_ms": run.loop_lag * 1e3}


def _range(values: list[float | int | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    return {"min": min(known), "median": median(known), "max": max(known)} if known else None


def _counted(errors: list[str]) -> dict[str, int]:
    """The commonest errors and how often each came."""
    counts: dict[str, int] = {}
    for error in errors:
        counts[error] = counts.get(error, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1])[:10])
