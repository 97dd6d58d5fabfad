"""What a training worker is told. Importing it is cheap: the driver needs it, and not the training stack behind it."""

from dataclasses import dataclass
from typing import Any

from altiplano.train.sink import MetricSink


@dataclass(frozen=True)
class Job:
    """All that a worker is told. Paths are on storage that every worker sees."""

    pipeline: dict[str, Any]
    prepared_dir: str
    run_dir: str
    sink: MetricSink
