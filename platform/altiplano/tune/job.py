"""What a trial is told. Importing it is cheap: the driver needs it, and not the training stack behind it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from altiplano.train.sink import MetricSink


@dataclass(frozen=True)
class TrialJob:
    """What every trial is told; `open_sink` makes the trial's own sink in the trial's process."""

    pipeline: dict[str, Any]
    prepared_dir: str
    open_sink: Callable[[str, dict[str, Any]], MetricSink]
