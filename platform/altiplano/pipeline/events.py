"""What happens in a pipeline, as a file of JSON lines: the driver appends, any number of readers follow.

The command line shows a run by reading this file, so it can leave (Ctrl-C) and come back without touching the run.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Event = dict[str, Any]


class EventLog:
    """Appends events. Kinds: run_started, stage_started, stage_skipped, progress, stage_finished, stage_failed, run_finished."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("a", buffering=1)

    def emit(self, kind: str, **fields: Any) -> None:
        """Append one event; one write per line, so that a reader never sees half of one from a live writer."""
        self._stream.write(json.dumps({"kind": kind, "time": time.time(), **fields}) + "\n")

    def close(self) -> None:
        self._stream.close()


def read(path: Path, offset: int = 0) -> tuple[list[Event], int]:
    """Complete events from byte `offset` on, and the offset to go on from. A torn last line is left for the next read."""
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            data = stream.read()
    except FileNotFoundError:
        return [], offset
    whole, _, _ = data.rpartition(b"\n")
    if not whole:
        return [], offset
    return [json.loads(line) for line in whole.split(b"\n") if line.strip()], offset + len(whole) + 1


def last_run(path: Path) -> Iterator[Event]:
    """The events since the latest run_started."""
    events, _ = read(path)
    start = max((i for i, event in enumerate(events) if event["kind"] == "run_started"), default=0)
    yield from events[start:]
