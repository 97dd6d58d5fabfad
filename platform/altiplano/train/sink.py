"""Where a training process reports to."""

from collections.abc import Mapping
from typing import Protocol


class MetricSink(Protocol):
    """Picklable; called on rank 0 only; never raises and never blocks on a network."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...

    def set_tags(self, tags: Mapping[str, str]) -> None: ...
