"""A page about one load: numbers, pictures, settings. One file that asks nothing of anybody."""

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from altiplano.client.bench.charts import Line, dot_chart, line_chart
from altiplano.client.bench.load import Record
from altiplano.client.bench.metrics import METRICS, concurrency_over_time, series, tokens_over_time
from altiplano.client.bench.quantiles import percentile

CURVE = [p / 2 for p in range(0, 200)] + [99.5, 99.9, 100.0]
RATE_POINTS, SHORTEST_BUCKET_S = 80, 0.1
STYLE = """
:root { color-scheme: light dark; --back: #fbfaf7; --ink: #1d2326; --dim: #5f696d; --rule: #d9d7cf; --c0: #0b6e8a; --c1: #b4531b; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14181a; --ink: #e6e4de; --dim: #9aa4a8; --rule: #333b3f; --c0: #58b9d6; --c1: #e8925a; }
}
body { background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 74rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0; } h2 { font-size: 1rem; margin: 2rem 0 .5rem; } p { color: var(--dim); margin: .2rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem; border-bottom: 1px solid var(--rule); text-align: right; font-weight: normal; }
thead th { color: var(--dim); } th[scope=row] { text-align: left; } .bad { color: var(--c1); }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1.5rem; }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: .3rem; } svg { width: 100%; height: auto; }
.grid { stroke: var(--rule); } .axis { stroke: var(--dim); } .tick, .label { fill: var(--dim); font-size: 12px; }
.end, .key { text-anchor: end; } .middle { text-anchor: middle; } .key { font-size: 13px; }
.line { fill: none; stroke-width: 1.8; } .line.c0 { stroke: var(--c0); } .line.c1 { stroke: var(--c1); }
.key.c0 { fill: var(--c0); } .key.c1 { fill: var(--c1); } .dot { fill: var(--c0); fill-opacity: .55; }
pre { overflow: auto; background: color-mix(in srgb, var(--rule) 35%, transparent); padding: .8rem; }
"""


def page(found: dict[str, Any], records: Sequence[Record], percentiles: Sequence[float]) -> str:
    """The report as HTML. `found` is the result file, `records` its run."""
    title = f"{found['model_id']}: {found['completed']:,} requests, {found['output_throughput']:,.0f} output tokens/s"
    failed = f'<p class="bad">{found["failed"]:,} requests failed: {escape(json.dumps(found["errors_seen"]))}</p>'
    settings = {
        key: found[key] for key in ("backend", "dataset", "request_fields", "lora_modules", "seed", "num_warmups", "client")
    }
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            f"<p>{escape(_asked(found))}</p>",
            failed if found["failed"] else "",
            "<h2>Latency in milliseconds</h2>",
            _latencies(found, percentiles),
            "<h2>Throughput</h2>",
            _throughput(found),
            "<h2>Pictures</h2>",
            f'<div class="pictures">{"".join(_pictures(records))}</div>',
            "<h2>Settings</h2>",
            f"<pre>{escape(json.dumps(settings, indent=1))}</pre>",
            "</body></html>\n",
        ]
    )


def _asked(found: dict[str, Any]) -> str:
    held = f", at most {found['max_concurrency']} in flight" if found["max_concurrency"] else ""
    runs = len(found["repetitions"] or [0])
    chosen = f"; the median of {runs} loads" if runs > 1 else ""
    return f"{found['request_rate']} requests per second, burstiness {found['burstiness']:g}{held}{chosen}; {found['date']} UTC"


def _latencies(found: dict[str, Any], percentiles: Sequence[float]) -> str:
    columns = ["mean", "median", "std", *(f"p{p:g}" for p in percentiles)]
    rows = [[name, *(_ms(found[f"{column}_{name}_ms"]) for column in columns)] for name in METRICS]
    return _table(["", *columns], rows)


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
    return _table([], rows)


def _pictures(records: Sequence[Record]) -> list[str]:
    good = [record for record in records if record.error is None]
    by_name = {one.name: sorted(one.values) for one in series(records)}
    pictures = []
    for title, names in (
        ("Time to first token: share of requests that wait no longer", ("ttft", "arrival_ttft")),
        ("Time per token: share that is no slower", ("tpot", "itl")),
    ):
        lines = [Line(name, [(percentile(by_name[name], p), p) for p in CURVE]) for name in names if by_name[name]]
        if lines:
            pictures.append(_figure(title, line_chart(title, "milliseconds", "% at most", lines, y_high=100.0)))
    if not good:
        return pictures
    title = "Time to first token over the run: growing means overload"
    dots = [(record.scheduled, (record.first - record.scheduled) * 1e3) for record in good]
    pictures.append(_figure(title, dot_chart(title, "arrival, seconds", "milliseconds from arrival", dots)))
    title = "Output tokens per second"
    bucket = max(SHORTEST_BUCKET_S, max(record.ended for record in good) / RATE_POINTS)
    rates = [(i * bucket, tokens / bucket) for i, tokens in enumerate(tokens_over_time(good, bucket))]
    pictures.append(_figure(title, line_chart(title, "seconds", "tokens/s", [Line("tokens/s", rates, step=True)])))
    title = "Requests in flight"
    steps = [(0.0, 0), *concurrency_over_time(good)]
    pictures.append(_figure(title, line_chart(title, "seconds", "requests", [Line("in flight", steps, step=True)])))
    title = "Length and time"
    lengths = [(float(record.output_tokens), record.ended - record.started) for record in good]
    pictures.append(_figure(title, dot_chart(title, "output tokens", "seconds from sending to the end", lengths)))
    return pictures


def _figure(title: str, picture: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{picture}</figure>"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    head = f"<thead><tr>{names}</tr></thead>" if columns else ""
    body = []
    for row in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        body.append(f'<tr><th scope="row">{escape(row[0])}</th>{cells}</tr>')
    return f"<table>{head}<tbody>{''.join(body)}</tbody></table>"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"
