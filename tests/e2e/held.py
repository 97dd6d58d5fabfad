"""`altiplano run` whose pipeline stands still where the file `hold` of its workspace says, until that file is gone or it is killed.

What a test does to it then cannot come too late. The file `held` says that it has got there. Places: "STAGE begun", "tune learning",
"train learning".
"""

import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from altiplano.train.sink import MetricSink


def stand_still(root: Path, place: str) -> None:
    pause = threading.Event()
    with suppress(FileNotFoundError):
        while (root / "hold").read_text() == place:
            (root / "held").touch()
            pause.wait(0.05)


@dataclass(frozen=True)
class HeldSink:
    """Holds a training after a loss was told, in rank 0's process."""

    sink: MetricSink
    root: Path

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.sink.log_metrics(metrics, step)
        if "train/loss" in metrics:
            stand_still(self.root, "train learning")

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.sink.set_tags(tags)


def drive() -> int:
    """The driver's process."""
    from altiplano.pipeline import driver
    from altiplano.pipeline.events import EventLog
    from altiplano.pipeline.ledger import Ledger
    from altiplano.pipeline.stages import train

    begin, emit, fit = Ledger.begin, EventLog.emit, train.fit

    def begin_and_hold(self: Ledger, stage: str, *rest: Any) -> None:
        begin(self, stage, *rest)
        stand_still(self._directory.parents[1], f"{stage} begun")

    def emit_and_hold(self: EventLog, kind: str, **fields: Any) -> None:
        emit(self, kind, **fields)
        if any(trial["tokens"] for trial in fields.get("trials", ())):
            stand_still(Path(self._stream.name).parents[1], "tune learning")

    def fit_and_hold(pipeline: Any, prepared: Path, out: Path, *, sink: MetricSink, name: str) -> Any:
        return fit(pipeline, prepared, out, sink=HeldSink(sink, Path(pipeline.run.storage_path).resolve()), name=name)

    Ledger.begin, EventLog.emit, train.fit = begin_and_hold, emit_and_hold, fit_and_hold
    return driver.main()


if __name__ == "__main__":
    if sys.argv[1:] == ["driver"]:
        sys.exit(drive())
    from altiplano import cli
    from altiplano.cli import runs

    runs.DRIVER = [sys.executable, __file__, "driver"]
    cli.main()
