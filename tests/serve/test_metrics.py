"""What a scrape, a log line and a trace say about requests; and that none of them says what was asked."""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from altiplano.serve.gpu_metrics import GpuCollector
from altiplano.serve.logs import ACCESS, JsonFormatter
from altiplano.serve.metrics import Metrics
from altiplano.serve.tracing import NoTraces, OtelTraces, make_traces

from .test_gate import LONG, SHORT, Guarded

SECRET = "Zanzibar"
CHAT: dict[str, Any] = {
    "model": "champion",
    "messages": [{"role": "user", "content": f"Where is {SECRET}?"}],
    "max_tokens": 12,
    "temperature": 0,
}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def guarded(adapter: Path, tmp_path_factory: pytest.TempPathFactory, spans: InMemorySpanExporter) -> Iterator[Guarded]:
    made = Guarded(adapter, tmp_path_factory.mktemp("keys"))
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    made.governance.traces = OtelTraces(provider)
    yield made
    made.close()


def scrape(guarded: Guarded) -> Samples:
    with guarded.http(guarded.admin) as http:
        text = http.get("/metrics").text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_metric_of_an_answer_under_vllms_meaning(guarded: Guarded) -> None:
    key = guarded.key("measured")
    labels = {"model": "champion", "arm": "orders-1", "key": key.split("-")[1]}
    with guarded.http(key) as http:
        usage = http.post("/v1/chat/completions", json=CHAT | {"ignore_eos": True}).json()["usage"]
        http.post("/v1/chat/completions", json=CHAT | {"ignore_eos": True})
    guarded.idle()
    found = scrape(guarded)

    def value(name: str, **more: str) -> float:
        return found[(f"altiplano_{name}", frozenset((labels | more).items()))]

    prompt = usage["prompt_tokens"]
    assert value("prompt_tokens_total") == value("prefix_cache_queries_total") == 2 * prompt
    assert value("prefix_cache_hits_total") == prompt // 32 * 32
    assert value("generation_tokens_total") == 24
    assert value("request_success_total", finished_reason="length") == 2
    for name, count in (
        ("time_to_first_token", 2),
        ("request_queue_time", 2),
        ("time_per_output_token", 2),
        ("inter_token_latency", 22),
        ("e2e_request_latency", 2),
    ):
        assert value(f"{name}_seconds_count") == count, name
    whole, first = value("e2e_request_latency_seconds_sum"), value("time_to_first_token_seconds_sum")
    assert 0 < value("request_queue_time_seconds_sum") < first < whole
    assert value("inter_token_latency_seconds_sum") == pytest.approx(whole - first, rel=1e-6)
    assert value("time_per_output_token_seconds_sum") == pytest.approx((whole - first) / 11, rel=1e-6)
    assert value("cost_usd_total") > 0
    route = frozenset({"route": "/v1/chat/completions", "status": "200"}.items())
    assert found[("altiplano_requests_total", route)] == 2


def ended(guarded: Guarded, key: str) -> Callable[..., float]:
    """What was counted for a key's answers of the base model."""
    guarded.idle()
    found, labels = scrape(guarded), {"model": "cria", "arm": "base", "key": key.split("-")[1]}
    return lambda name, **more: found.get((f"altiplano_{name}", frozenset((labels | more).items())), 0.0)


def test_an_answer_that_ends_at_a_stop_string_is_counted_whole(guarded: Guarded) -> None:
    key = guarded.key("stopping")
    with guarded.http(key) as http:
        text = http.post("/v1/completions", json=LONG | {"max_tokens": 40}).json()["choices"][0]["text"]
        stop = next(text[i : i + 3] for i in range(8, len(text)) if text.index(text[i : i + 3]) == i)
        answer = http.post("/v1/completions", json=LONG | {"stop": [stop]}).json()["choices"][0]
    assert answer["finish_reason"] == "stop"
    value = ended(guarded, key)
    assert value("request_success_total", finished_reason="stop") == value("request_success_total", finished_reason="length") == 1
    assert value("request_success_total", finished_reason="abort") == 0
    assert value("e2e_request_latency_seconds_count") == value("time_per_output_token_seconds_count") == 2


def test_an_answer_that_nobody_waited_for_is_an_abort_and_no_latency(guarded: Guarded) -> None:
    key = guarded.key("leaving")
    with guarded.unending():
        with guarded.http(key) as http, http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as stream:
            next(stream.iter_lines())
        guarded.idle()
    value = ended(guarded, key)
    assert value("request_success_total", finished_reason="abort") == value("time_to_first_token_seconds_count") == 1
    assert value("e2e_request_latency_seconds_count") == 0 < value("generation_tokens_total")


def test_a_prompt_that_is_only_scored_has_its_tokens_and_its_time(guarded: Guarded) -> None:
    key = guarded.key("scoring")
    began = guarded.clock()
    with guarded.http(key) as http:
        body = SHORT | {"max_tokens": 0, "echo": True, "logprobs": 1}
        assert http.post("/v1/completions", json=body).status_code == 200
        (row,) = http.get("/v1/usage").json()["data"]
    value = ended(guarded, key)
    assert row["prompt_tokens"] == value("prompt_tokens_total") == 3 and value("generation_tokens_total") == 0
    assert value("e2e_request_latency_seconds_count") == 1
    assert 0 < value("e2e_request_latency_seconds_sum") < guarded.clock() - began
    assert value("time_to_first_token_seconds_count") == 0


def test_the_engines_own_state(guarded: Guarded) -> None:
    with guarded.unending():
        with guarded.http(guarded.user) as http, http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            busy = scrape(guarded)
        guarded.idle()
    after = scrape(guarded)
    none: frozenset[tuple[str, str]] = frozenset()
    assert busy[("altiplano_num_requests_running", none)] == 1 and after[("altiplano_num_requests_running", none)] == 0
    assert 0 < busy[("altiplano_kv_cache_usage_perc", none)] <= 1
    assert after[("altiplano_kv_cache_usage_perc", none)] == 0 < after[("altiplano_prefix_cache_pages", none)]
    assert busy[("altiplano_num_requests_waiting", none)] == 0 and busy[("altiplano_engine_up", none)] == 1


def test_refusals_are_counted_with_their_reason_and_key(guarded: Guarded) -> None:
    key = guarded.key("eager", requests_per_minute=1)
    with guarded.http(key) as http:
        assert [http.post("/v1/completions", json=SHORT).status_code for _ in range(3)] == [200, 429, 429]
    labels = frozenset({"reason": "rate_limit_exceeded", "key": key.split("-")[1]}.items())
    assert scrape(guarded)[("altiplano_requests_rejected_total", labels)] == 2


def test_clients_cannot_make_series(guarded: Guarded) -> None:
    def invent(name: str) -> set[Any]:
        with guarded.http(guarded.admin) as http:
            http.post("/v1/completions", json=SHORT | {"model": name})
            http.get(f"/{name}")
            http.request(name, "/health")
        return set(scrape(guarded))

    scrape(guarded)  # the first one has a series of its own from then on
    series = invent("made-up-1")
    assert invent("made-up-2") == series and not any("made-up" in str(labels) for _, labels in series)


def test_usage_is_a_keys_own_and_everybodys_for_an_administrator(guarded: Guarded) -> None:
    key = guarded.key("payer")
    with guarded.http(key) as http:
        http.post("/v1/completions", json=SHORT)
        rows = http.get("/v1/usage").json()["data"]
    assert [row["key"] for row in rows] == [key.split("-")[1]]
    assert rows[0]["prompt_tokens"] == 3 and rows[0]["completion_tokens"] == 4 and rows[0]["requests"] == 1
    assert rows[0]["usd_per_million_tokens"] == pytest.approx(rows[0]["cost_usd"] / 7 * 1e6)
    with guarded.http(guarded.admin) as http:
        everybody = http.get("/v1/usage").json()["data"]
    assert {"idle", key.split("-")[1]} <= {row["key"] for row in everybody}


def test_a_log_line_says_who_and_how_long_and_not_what(guarded: Guarded, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with guarded.http(guarded.user) as http:
        answer = http.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "line-1"}).json()
        http.post("/v1/chat/completions", json=CHAT | {"temperature": SECRET})
        http.post("/v1/chat/completions", content=f'{{"{SECRET}'.encode())
        http.get(f"/{SECRET}", params={"q": SECRET})
    guarded.idle()
    lines = [JsonFormatter().format(record) for record in caplog.records if record.name.startswith("altiplano")]
    assert SECRET not in "".join(lines) and guarded.user not in "".join(lines)
    assert answer["choices"][0]["message"]["content"] not in "".join(lines)
    line = next(parsed for parsed in map(json.loads, lines) if parsed.get("request_id") == "line-1")
    assert line["logger"] == ACCESS and line["status"] == 200 and line["model"] == "champion" and line["arm"] == "orders-1"
    assert line["key"] == guarded.user.split("-")[1] and 0 < line["ttft_s"] < line["seconds"]
    assert line["prompt_tokens"] == answer["usage"]["prompt_tokens"] and line["finish_reasons"]


def test_a_trace_joins_the_clients_and_holds_no_text(guarded: Guarded, spans: InMemorySpanExporter) -> None:
    spans.clear()
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with guarded.http(guarded.user) as http:
        http.post("/v1/chat/completions", json=CHAT, headers={"traceparent": parent})
    guarded.idle()
    # Others, of requests before, may end after the answer that their clients have got.
    ended = [span for span in spans.get_finished_spans() if span.context is not None]
    (span,) = [span for span in ended if format(span.context.trace_id, "032x") == parent.split("-")[1]]
    assert span.name == "POST /v1/chat/completions" and span.parent is not None
    attributes = dict(span.attributes or {})
    assert attributes["gen_ai.request.model"] == "champion" and attributes["http.response.status_code"] == 200
    assert attributes["gen_ai.usage.input_tokens"] and attributes["gen_ai.usage.output_tokens"]
    (first,) = span.events
    assert span.start_time is not None and span.end_time is not None
    assert first.name == "gen_ai.first_token" and span.start_time < first.timestamp < span.end_time
    assert SECRET not in span.to_json()


def test_no_traces_unless_asked_for() -> None:
    assert isinstance(make_traces(None), NoTraces)


class NvmlError(Exception):
    """NVML's own error."""


def nvml(*, driver: bool) -> Any:
    """NVIDIA's library on a machine with three GPUs, of which the second is a MIG slice and the third is lost; or without a driver."""

    def init() -> None:
        if not driver:
            raise NvmlError

    def rates(gpu: int) -> Any:
        if gpu == 1:
            raise NvmlError
        return SimpleNamespace(gpu=42)

    def memory(gpu: int) -> Any:
        if gpu == 2:
            raise NvmlError
        return SimpleNamespace(used=1000 + gpu, total=4000)

    return SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=init,
        nvmlDeviceGetCount=lambda: 3,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=memory,
        nvmlDeviceGetUtilizationRates=rates,
    )


@pytest.mark.parametrize("library", [None, nvml(driver=False)], ids=["no library", "no driver"])
def test_without_a_gpu_there_are_no_gpu_metrics(monkeypatch: pytest.MonkeyPatch, library: Any) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert list(GpuCollector().collect()) == []


def test_a_driver_that_goes_away_takes_no_other_metric_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    library = nvml(driver=True)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    metrics = Metrics()

    def gone() -> int:
        raise NvmlError

    library.nvmlDeviceGetCount = gone
    assert b"altiplano_engine_up" in metrics.render()


def test_each_gpu_shows_its_memory_and_those_that_can_their_utilisation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(driver=True))
    found = {
        (sample.name, sample.labels["gpu"]): sample.value for family in GpuCollector().collect() for sample in family.samples
    }
    assert found == {
        ("altiplano_gpu_memory_used_bytes", "0"): 1000,
        ("altiplano_gpu_memory_used_bytes", "1"): 1001,
        ("altiplano_gpu_memory_total_bytes", "0"): 4000,
        ("altiplano_gpu_memory_total_bytes", "1"): 4000,
        ("altiplano_gpu_utilization_ratio", "0"): 0.42,
    }
