"""The engine's histograms over its steps as Prometheus reads them. The engine counts; here is only what it said last."""

from collections.abc import Iterator, Mapping
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from altiplano.engine.steps import Histogram

TEXTS = {
    "iteration_tokens_total": "Tokens of a step, of prompts and generated",
    "iteration_decode_seqs": "Requests of a step that compute one token",
    "iteration_seconds": "Time in which the device computes a step",
    "iteration_gap_seconds": "Time before a step in which the device had nothing to do though requests were there",
}


class StepCollector(Collector):
    """Shows `histograms`, by the engine's names; they begin again when the engine does, as counters may."""

    def __init__(self) -> None:
        self.histograms: Mapping[str, Histogram] = {}

    def collect(self) -> Iterator[HistogramMetricFamily]:
        for name, found in self.histograms.items():
            family = HistogramMetricFamily(f"altiplano_{name}", TEXTS[name])
            bounds = [*map(floatToGoString, found.bounds), "+Inf"]
            family.add_metric([], list(zip(bounds, accumulate(found.counts), strict=True)), found.total)
            yield family
