"""Which stages are finished, for which inputs: the reason why nothing runs twice.

A stage has a digest of everything it depends on. When it ends, a record with that digest and its outputs is written
atomically; the next run with the same digest and with all output files still there skips the stage.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from altiplano.pipeline.workspace import Workspace, write_json

Outputs = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """One finished stage. `outputs` is JSON; names that end in `_path` are files or directories that must still exist."""

    stage: str
    digest: str
    outputs: Outputs
    seconds: float
    mlflow_run_id: str | None = None


class Ledger:
    """Records of one run, one file a stage: `<run>/stages/<stage>.json`."""

    def __init__(self, workspace: Workspace) -> None:
        self._directory = workspace.run_dir / "stages"

    def finished(self, stage: str, digest: str) -> Record | None:
        """The record of `stage` if it finished with these inputs and its outputs are all there."""
        record = self.latest(stage)
        if record is None or record.digest != digest:
            return None
        paths = [value for name, value in record.outputs.items() if name.endswith("_path") and value]
        return record if all(Path(p).exists() for p in paths) else None

    def latest(self, stage: str) -> Record | None:
        """The last record of `stage`, whatever its inputs; None when there is none or it cannot be read."""
        try:
            return Record(**json.loads((self._directory / f"{stage}.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def finish(self, record: Record) -> None:
        write_json(self._directory / f"{record.stage}.json", asdict(record))

    def begin(self, stage: str, digest: str, mlflow_run_id: str | None) -> None:
        """Remember the MLflow run of a stage that starts, so that a later attempt goes on in the same one."""
        write_json(self._directory / f"{stage}.started.json", {"digest": digest, "mlflow_run_id": mlflow_run_id})

    def begun(self, stage: str, digest: str) -> str | None:
        """The MLflow run of an unfinished attempt with the same inputs."""
        try:
            started = json.loads((self._directory / f"{stage}.started.json").read_text())
        except (OSError, ValueError):
            return None
        return started["mlflow_run_id"] if started.get("digest") == digest else None


def digest(value: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of `value`, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()).hexdigest()
