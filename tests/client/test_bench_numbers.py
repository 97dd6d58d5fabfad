"""Arrivals, formulas and pictures of the benchmark: pure functions with known answers."""

import json
import math
import random
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altiplano.client.bench.arrivals import RampUp, ramp, schedule
from altiplano.client.bench.charts import Axis, Line, line_chart
from altiplano.client.bench.comparison import comparison, read_result
from altiplano.client.bench.load import Record, Run
from altiplano.client.bench.metrics import concurrency_over_time, parse_goodput, summary, tokens_over_time
from altiplano.client.bench.plan import Arrivals, Plan
from altiplano.client.bench.quantiles import percentile
from altiplano.client.bench.report import page
from altiplano.client.bench.result import details, median_run, result


def record(scheduled: float, started: float, pieces: list[float], tokens: int | None = None, **more: Any) -> Record:
    return Record(
        "cria",
        scheduled,
        scheduled,
        started,
        pieces,
        pieces[-1],
        prompt_tokens=10,
        output_tokens=len(pieces) if tokens is None else tokens,
        has_usage=True,
        **more,
    )


@settings(deadline=None)
@given(st.integers(1, 400), st.floats(0.1, 1000), st.floats(0.1, 20), st.integers(0, 99))
def test_arrivals_have_the_asked_rate_and_repeat_by_seed(count: int, rate: float, burstiness: float, seed: int) -> None:
    times = schedule(count, rate, burstiness, random.Random(seed))
    assert times == sorted(times) and times[0] >= 0
    assert times[-1] == pytest.approx(count / rate)
    assert times == schedule(count, rate, burstiness, random.Random(seed))


@pytest.mark.parametrize(("burstiness", "variation"), [(0.25, 2.0), (1.0, 1.0), (4.0, 0.5), (math.inf, 0.0)])
def test_burstiness_is_the_shape_of_the_gaps(burstiness: float, variation: float) -> None:
    """A gamma distribution of shape k varies by 1/√k of its mean; shape 1 is Poisson arrivals."""
    gaps = np.diff(schedule(40_000, 50.0, burstiness, random.Random(1)))
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(variation, rel=0.05, abs=1e-6)


def test_an_infinite_rate_and_a_ramp() -> None:
    assert schedule(3, math.inf, 1.0, random.Random(0)) == [0.0, 0.0, 0.0]
    even = ramp(100, 1.0, 100.0, RampUp.linear, math.inf, random.Random(0))
    gaps = np.diff([0.0, *even])
    assert gaps[0] == pytest.approx(1.0) and gaps[-1] == pytest.approx(0.01)
    grown = np.diff([0.0, *ramp(101, 1.0, 100.0, RampUp.exponential, math.inf, random.Random(0))])
    assert grown[50] == pytest.approx(0.1)
    for wrong in (Arrivals(request_rate=0), Arrivals(burstiness=0), Arrivals(ramp_up_strategy=RampUp.linear)):
        with pytest.raises(ValueError, match=r"above 0|ramp-up"):
            wrong.draw(3, random.Random(0))


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], p: float) -> None:
    assert percentile(sorted(values), p) == pytest.approx(np.percentile(values, p), rel=1e-9, abs=1e-9)


def test_the_formulas_are_vllms() -> None:
    records = [
        record(0.0, 0.0, [0.1, 0.2, 0.4]),
        # Two tokens came in one chunk: itl sees chunks, tpot sees tokens.
        record(0.5, 1.0, [1.2, 1.6], tokens=5),
        record(1.0, 1.0, [1.5]),
        record(2.0, 2.0, [2.5], error="500: broken"),
    ]
    found = summary(records, (50, 99), {"ttft": 300.0})
    assert (found["completed"], found["failed"]) == (3, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (30, 9)
    assert found["duration"] == 2.5
    assert found["output_throughput"] == pytest.approx(9 / 2.5) and found["total_token_throughput"] == pytest.approx(39 / 2.5)
    ttft, tpot, itl, e2el = [100, 200, 500], [150, 100], [100, 200, 400], [400, 600, 500]
    for name, values in (("ttft", ttft), ("tpot", tpot), ("itl", itl), ("e2el", e2el)):
        assert found[f"mean_{name}_ms"] == pytest.approx(np.mean(values))
        assert found[f"median_{name}_ms"] == pytest.approx(np.median(values))
        assert found[f"std_{name}_ms"] == pytest.approx(np.std(values))
        assert found[f"p99_{name}_ms"] == pytest.approx(np.percentile(values, 99))
    # The second was held back for half a second: its user waited 700 ms, although its ttft says 200.
    assert found["p99_queue_ms"] == pytest.approx(np.percentile([0, 500, 0], 99))
    assert found["request_goodput"] == pytest.approx(1 / 2.5)


def test_a_load_without_answers_has_no_latency() -> None:
    found = summary([record(0, 0, [1.0], error="x")], (99,), {"ttft": 1})
    assert found["mean_ttft_ms"] is None and found["completed"] == 0 and found["request_goodput"] == 0


def test_time_series() -> None:
    records = [record(0.0, 0.0, [0.5, 1.5], tokens=4), record(0.0, 1.0, [1.2, 2.0])]
    assert tokens_over_time(records, 1.0) == [2.0, 3.0, 1.0]
    assert concurrency_over_time(records) == [(0.0, 1), (1.0, 2), (1.5, 1), (2.0, 0)]
    # One ends as the other starts: never two at once.
    touching = [record(0, 0.0, [1.0]), record(0, 1.0, [2.0])]
    assert max(count for _, count in concurrency_over_time(touching)) == 1


def test_goodput_objectives() -> None:
    assert parse_goodput(["ttft:500 tpot:50", "e2el:1e4"]) == {"ttft": 500, "tpot": 50, "e2el": 10000}
    assert parse_goodput(["ttft:500,tpot:50"]) == {"ttft": 500, "tpot": 50}
    for wrong in ("ttft", "itl:3", "ttft:fast", "ttft:0", ""):
        with pytest.raises(ValueError, match="--goodput"):
            parse_goodput([wrong])


def test_the_median_run_stands_for_all_and_the_spread_is_told() -> None:
    runs = [Run([record(0, 0, [end])], 0.5, 0.001) for end in (3.0, 1.0, 2.0)]
    assert median_run(runs) == 2
    found = result(Plan(model="cria", repeat=3), runs, (99,), None, ["bench"], {"commit": "abc"})
    assert found["output_throughput"] == pytest.approx(0.5)
    assert found["spread"]["output_throughput"] == {"min": pytest.approx(1 / 3), "median": pytest.approx(0.5), "max": 1.0}
    assert (
        len(found["repetitions"]) == 3
        and found["commit"] == "abc"
        and found["client_loop_lag_ms"] == 1.0
        and found["request_rate"] == "inf"
    )
    assert details(runs[2].records)["ttfts"] == [2.0] and details(runs[2].records)["itls"] == [[]]


@settings(deadline=None)
@given(st.floats(1e-6, 1e9))
def test_ticks_are_round_and_few(high: float) -> None:
    ticks = Axis("x", 0.0, high).ticks()
    assert 3 <= len(ticks) <= 6 and ticks[0] == 0 and ticks[-1] <= high * (1 + 1e-9)
    assert re.fullmatch(r"[125]0*(\.0)?|[125](\.0+)?e[+-]\d+|0\.0*[125]", f"{ticks[1]:.12g}")


def test_a_long_line_becomes_a_small_picture() -> None:
    points = [(float(i), float(i % 7)) for i in range(100_000)]
    picture = line_chart("t & t", "x", "y", [Line("<a>", points), Line("b", points)])
    assert len(picture) < 100_000
    drawn = ElementTree.fromstring(picture)
    keys = [element.text for element in drawn.iter() if element.get("class", "").startswith("key")]
    assert keys == ["<a>", "b"]


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_report_is_one_file_that_asks_for_nothing() -> None:
    records = [record(i / 10, i / 10, [i / 10 + 0.05, i / 10 + 0.1]) for i in range(30)]
    records.append(record(3.0, 3.0, [3.1], error="500: <script>alert(1)</script>"))
    found = result(Plan(model="<cria>"), [Run(records, 0.5, 0.001)], (50, 99), {"ttft": 60.0}, ["bench"], {})
    html = page(found, records, (50, 99))
    parsed = _Page()
    parsed.feed(html)
    names = [tag for tag, _ in parsed.tags]
    assert "script" not in names and "link" not in names and "img" not in names
    assert not any(name in ("src", "href") for _, attributes in parsed.tags for name in attributes)
    assert names.count("svg") == 6
    for picture in re.findall(r"<svg.*?</svg>", html):
        ElementTree.fromstring(picture)
    # One dot per answered request in each of the two clouds.
    assert names.count("circle") == 60
    assert "ttft ≤ 60 ms" in html and "&lt;cria&gt;" in html


def test_results_side_by_side(tmp_path: Path) -> None:
    def one(label: str | None, rate: float | str, throughput: float) -> dict[str, Any]:
        latencies = {f"{s}_{m}_ms": throughput / 10 for s in ("median", "p99") for m in ("ttft", "tpot")}
        return {
            "label": label,
            "backend": "vllm",
            "model_id": "m",
            "request_rate": rate,
            "output_throughput": throughput,
        } | latencies

    named = [("a1", one("ours", 1.0, 10.0)), ("a2", one("ours", 2.0, 20.0)), ("v", one(None, "inf", 15.0))]
    html = comparison(named)
    parsed = _Page()
    parsed.feed(html)
    tags = [tag for tag, _ in parsed.tags]
    # Nobody asked for goodput, so four curves; each has a dot for each of three results.
    assert tags.count("svg") == 4 and tags.count("circle") == 12 and tags.count("tr") == 4
    assert "ours against vllm m" in html and not any("src" in attributes or "href" in attributes for _, attributes in parsed.tags)
    good = comparison([(name, found | {"request_goodput": 1.0}) for name, found in named])
    assert good.count("<svg") == 5
    with pytest.raises(ValueError, match="fewer files"):
        comparison([(str(i), one(str(i), 1.0, 1.0)) for i in range(7)])
    for text in ("{", "[]", '{"x": 1}'):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(ValueError, match=r"r\.json is no"):
            read_result(tmp_path / "r.json")
    (tmp_path / "r.json").write_text(json.dumps(named[0][1]))
    assert read_result(tmp_path / "r.json") == named[0][1]
