"""Prometheus metrics under vLLM's meanings, with our prefix and the labels model, arm (the adapter that answered) and key (its id).

Latencies start when the HTTP request arrived and end when the front end has the token: what a user meets, less the network.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from altiplano.engine.steps import Histogram as StepHistogram
from altiplano.serve.gpu_metrics import GpuCollector
from altiplano.serve.step_metrics import StepCollector

LABELS = ("model", "arm", "key")
# vLLM's bounds, with finer ones below: a 1B model takes well under a millisecond per token on a GPU.
FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
TOKEN_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
REQUEST_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)

SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")  # vLLM's names, by level


@dataclass(frozen=True)
class Labels:
    """Whose answer: `model` as the client named it, `arm` the adapter or base behind it, `key` the id of the API key."""

    model: str
    arm: str
    key: str


class AnswerMetrics:
    """The metrics of answers with one set of labels, looked up once."""

    def __init__(self, metrics: "Metrics", labels: Labels) -> None:
        values = (labels.model, labels.arm, labels.key)
        self.first_token = metrics.first_token.labels(*values)
        self.per_output_token = metrics.per_output_token.labels(*values)
        self.inter_token = metrics.inter_token.labels(*values)
        self.end_to_end = metrics.end_to_end.labels(*values)
        self.queued = metrics.queued.labels(*values)
        self.prompt_tokens = metrics.prompt_tokens.labels(*values)
        self.generation_tokens = metrics.generation_tokens.labels(*values)
        self.cache_queries = metrics.cache_queries.labels(*values)
        self.cache_hits = metrics.cache_hits.labels(*values)
        self._success, self._values = metrics.success, values

    def finished(self, reason: str) -> None:
        self._success.labels(*self._values, reason).inc()


class Metrics:
    """All metrics of one front end, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._of: dict[Labels, AnswerMetrics] = {}

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"altiplano_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"altiplano_{name}", text, labels, registry=self.registry)

        def seconds(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"altiplano_{name}_seconds", text, labels, buckets=buckets, registry=self.registry)

        self.http_requests = counter("requests", "HTTP answers", "route", "status")
        self.http_seconds = seconds("request", "Arrival to the last byte of an HTTP answer", REQUEST_S, "route")
        self.rejected = counter("requests_rejected", "HTTP requests that a limit refused", "reason", "key")
        self.asleep = counter("requests_asleep", "HTTP answers of 503 because the engine was put to sleep")
        self.clients_gone = counter("clients_gone", "Clients that left before their answer was complete", "reason")
        self.response_cache = counter("response_cache", "Greedy requests looked up in the response cache", "result")

        self.first_token = seconds("time_to_first_token", "Arrival to the first token", FIRST_TOKEN_S, *LABELS)
        self.per_output_token = seconds(
            "time_per_output_token", "(last token - first token) / (tokens - 1) of an answer", TOKEN_S, *LABELS
        )
        self.inter_token = seconds("inter_token_latency", "Gap between two tokens", TOKEN_S, *LABELS)
        self.end_to_end = seconds("e2e_request_latency", "Arrival to the last token", REQUEST_S, *LABELS)
        self.queued = seconds("request_queue_time", "Wait in the engine before its first step", FIRST_TOKEN_S, *LABELS)
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of answers that began", *LABELS)
        self.generation_tokens = counter("generation_tokens", "Generated tokens", *LABELS)
        self.cache_queries = counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", *LABELS)
        self.cache_hits = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache", *LABELS)
        self.success = counter("request_success", "Answers that ended", *LABELS, "finished_reason")

        self._engine = {
            "num_running": gauge("num_requests_running", "Requests in the engine's batch"),
            "num_waiting": gauge("num_requests_waiting", "Requests that wait for the engine"),
            "kv_cache_held": gauge("kv_cache_usage_perc", "Share of KV pages that requests hold, 1 is all"),
            "num_cached_pages": gauge(
                "prefix_cache_pages", "KV pages with cached prefixes; they give way when requests need them"
            ),
            "preemptions": gauge("num_preemptions", "Requests that gave up their pages, since the engine started"),
            "steps": gauge("engine_steps", "Steps since the engine started"),
            "step_seconds": gauge("engine_step_seconds", "Time inside steps since the engine started"),
            "guessed_tokens": gauge("spec_decode_num_draft_tokens", "Tokens that were guessed, since the engine started"),
            "accepted_tokens": gauge(
                "spec_decode_num_accepted_tokens", "Guessed tokens that were right, since the engine started"
            ),
            "guessed_steps": gauge("spec_decode_steps", "Steps with guesses since the engine started"),
            "draft_seconds": gauge("spec_decode_draft_seconds", "Time that making guesses has taken since the engine started"),
        }
        self.sleep_state = gauge("engine_sleep_state", "1 for the state that the engine is in", "sleep_state")
        self.engine_up = gauge("engine_up", "1 while the engine answers, falls asleep or wakes up")
        self.engine_restarts = gauge("engine_restarts", "Starts of the engine after the first")
        self._steps = StepCollector()
        self.registry.register(self._steps)
        self.registry.register(GpuCollector())

    def of(self, labels: Labels) -> AnswerMetrics:
        """The metrics with these labels filled in."""
        found = self._of.get(labels)
        if found is None:
            found = self._of[labels] = AnswerMetrics(self, labels)
        return found

    def set_engine(
        self,
        stats: dict[str, float] | None,
        restarts: int,
        histograms: Mapping[str, StepHistogram] | None = None,
        sleep_level: int = 0,
        turning: bool = False,
    ) -> None:
        """Take the engine's own counters and histograms; None when it does not answer, which is well while it is `turning`."""
        for level, state in enumerate(SLEEP_STATES):
            self.sleep_state.labels(state).set(level == sleep_level)
        if histograms is not None:
            self._steps.histograms = histograms
        self.engine_up.set(stats is not None or turning)
        self.engine_restarts.set(restarts)
        for name, gauge in self._engine.items():
            if stats is not None and name in stats:
                gauge.set(stats[name])

    def render(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self.registry)
