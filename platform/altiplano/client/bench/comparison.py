"""A page about several result files, of ours or of `vllm bench serve`: latency against throughput, and a table."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from altiplano.client.bench.charts import Line, line_chart
from altiplano.client.bench.markup import document, figures, number, table

Result = dict[str, Any]
# As many colours as the page has.
MAX_GROUPS = 6
COLUMNS = {
    "request_rate": "rate",
    "max_concurrency": "concurrency",
    "completed": "answered",
    "failed": "failed",
    "request_throughput": "requests/s",
    "request_goodput": "good requests/s",
    "output_throughput": "output tokens/s",
    "median_ttft_ms": "median ttft, ms",
    "p99_ttft_ms": "p99 ttft, ms",
    "median_tpot_ms": "median tpot, ms",
    "p99_tpot_ms": "p99 tpot, ms",
}
CURVES = ("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms")


def read_result(path: Path) -> Result:
    """
    Raises:
        ValueError: this is no result file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from error
    if not isinstance(found, dict) or "output_throughput" not in found:
        raise ValueError(f"{path} is no result of `altiplano bench` or `vllm bench serve`: it has no output_throughput")
    return found


def comparison(results: Sequence[tuple[str, Result]]) -> str:
    """The page. Results with the same `label` (else the same backend and model) are points of one line."""
    groups: dict[str, list[Result]] = {}
    for _, found in results:
        groups.setdefault(_group(found), []).append(found)
    if len(groups) > MAX_GROUPS:
        raise ValueError(f"{len(groups)} labels are more than the {MAX_GROUPS} that one picture can tell apart: give fewer files")
    rows = [[name, _group(found), *(_cell(found.get(key)) for key in COLUMNS)] for name, found in results]
    pictures = [(title, picture) for key in CURVES if (picture := _curve(title := _title(key), key, groups))]
    rates = _goodput(groups)
    return document(
        " against ".join(groups),
        [
            f"<p>{len(results)} results; latency and throughput of each load are one point.</p>",
            figures([*pictures, *rates]),
            "<h2>Numbers</h2>",
            table(["", "label", *COLUMNS.values()], rows),
        ],
    )


def _curve(title: str, key: str, groups: dict[str, list[Result]]) -> str | None:
    lines = _lines(groups, "output_throughput", key)
    return line_chart(title, "output tokens per second", "milliseconds", lines) if lines else None


def _goodput(groups: dict[str, list[Result]]) -> list[tuple[str, str]]:
    lines = _lines(groups, "request_rate", "request_goodput")
    title = "Good requests per second against asked ones"
    return [(title, line_chart(title, "asked requests per second", "good requests per second", lines))] if lines else []


def _lines(groups: dict[str, list[Result]], x: str, y: str) -> list[Line]:
    lines = []
    for label, found in groups.items():
        points = [(_number(one.get(x)), _number(one.get(y))) for one in found]
        known = sorted((a, b) for a, b in points if a is not None and b is not None)
        lines.append(Line(label, known, marked=True))
    return lines if any(line.points for line in lines) else []


def _number(value: Any) -> float | None:
    # vLLM writes an unbounded rate as the text "inf".
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _group(found: Result) -> str:
    return str(found.get("label") or f"{found.get('backend', '')} {found.get('model_id', '')}".strip())


def _title(key: str) -> str:
    statistic, metric, _ = key.split("_")
    return f"{metric}, {statistic}, against throughput"


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else number(value)
