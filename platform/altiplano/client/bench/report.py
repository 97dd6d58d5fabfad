"""A page about one load: numbers, pictures, settings."""

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from altiplano.client.bench.charts import Line, dot_chart, line_chart
from altiplano.client.bench.load import Record
from altiplano.client.bench.markup import document, figures, number, table
from altiplano.client.bench.metrics import METRICS, concurrency_over_time, series, tokens_over_time
from altiplano.client.bench.quantiles import percentile

CURVE = [p / 2 for p in range(0, 200)] + [99.5, 99.9, 100.0]
RATE_POINTS, SHORTEST_BUCKET_S = 80, 0.1


def page(found: dict[str, Any], records: Sequence[Record], percentiles: Sequence[float]) -> str:
    """The report as HTML. `found` is the result file, `records` its run."""
    title = f"{found['model_id']}: {found['completed']:,} requests, {found['output_throughput']:,.0f} output tokens/s"
    failed = f'<p class="bad">{found["failed"]:,} requests failed: {escape(json.dumps(found["errors_seen"]))}</p>'
    settings = {
        key: found[key] for key in ("backend", "dataset", "request_fields", "lora_modules", "seed", "num_warmups", "client")
    }
    return document(
        title,
        [
            f"<p>{escape(_asked(found))}</p>",
            failed if found["failed"] else "",
            "<h2>Latency in milliseconds</h2>",
            _latencies(found, percentiles),
            "<h2>Throughput</h2>",
            _throughput(found),
            "<h2>Pictures</h2>",
            figures(_pictures(records)),
            "<h2>Settings</h2>",
            f"<pre>{escape(json.dumps(settings, indent=1))}</pre>",
        ],
    )


def _asked(found: dict[str, Any]) -> str:
    held = f", at most {found['max_concurrency']} in flight" if found["max_concurrency"] else ""
    runs = len(found["repetitions"] or [0])
    chosen = f"; the median of {runs} loads" if runs > 1 else ""
    return f"{found['request_rate']} requests per second, burstiness {found['burstiness']:g}{held}{chosen}; {found['date']} UTC"


def _latencies(found: dict[str, Any], percentiles: Sequence[float]) -> str:
    columns = ["mean", "median", "std", *(f"p{p:g}" for p in percentiles)]
    rows = [[name, *(number(found[f"{column}_{name}_ms"]) for column in columns)] for name in METRICS]
    return table(["", *columns], rows)


def _throughput(found: dict[str, Any]) -> str:
    rows = [
        ["requests per second", f"{found['request_throughput']:,.2f}"],
        ["output tokens per second", f"{found['output_throughput']:,.1f}"],
        ["all tokens per second", f"{found['total_token_throughput']:,.1f}"],
        ["most output tokens in one second", f"{found['max_output_tokens_per_s']:,.0f}"],
        ["most requests in flight", f"{found['max_concurrent_requests']:,}"],
        ["latest departure of a request, ms", f"{found['max_schedule_lag_ms']:,.1f}"],
        ["client's event loop late by, p99 in ms", f"{found['client_loop_lag_ms']:,.1f}"],
        ["client's processor, share of a core", f"{found['client_cpu_share']:.2f}"],
    ]
    if found["request_goodput"] is not None:
        objectives = ", ".join(f"{name} ≤ {bound:g} ms" for name, bound in found["goodput_objectives_ms"].items())
        rows.insert(1, [f"good requests per second ({objectives})", f"{found['request_goodput']:,.2f}"])
    return table([], rows)


def _pictures(records: Sequence[Record]) -> list[tuple[str, str]]:
    good = [record for record in records if record.error is None]
    by_name = {one.name: sorted(one.values) for one in series(records)}
    pictures = []
    for title, names in (
        ("Time to first token: share of requests that wait no longer", ("ttft", "arrival_ttft")),
        ("Time per token: share that is no slower", ("tpot", "itl")),
    ):
        lines = [Line(name, [(percentile(by_name[name], p), p) for p in CURVE]) for name in names if by_name[name]]
        if lines:
            pictures.append((title, line_chart(title, "milliseconds", "% at most", lines, y_high=100.0)))
    if not good:
        return pictures
    title = "Time to first token over the run: growing means overload"
    dots = [(record.scheduled, (record.first - record.scheduled) * 1e3) for record in good]
    pictures.append((title, dot_chart(title, "arrival, seconds", "milliseconds from arrival", dots)))
    title = "Output tokens per second"
    bucket = max(SHORTEST_BUCKET_S, max(record.ended for record in good) / RATE_POINTS)
    rates = [(i * bucket, tokens / bucket) for i, tokens in enumerate(tokens_over_time(good, bucket))]
    pictures.append((title, line_chart(title, "seconds", "tokens/s", [Line("tokens/s", rates, step=True)])))
    title = "Requests in flight"
    steps = [(0.0, 0), *concurrency_over_time(good)]
    pictures.append((title, line_chart(title, "seconds", "requests", [Line("in flight", steps, step=True)])))
    title = "Length and time"
    lengths = [(float(record.output_tokens), record.ended - record.started) for record in good]
    pictures.append((title, dot_chart(title, "output tokens", "seconds from sending to the end", lengths)))
    return pictures
