"""What a stage gets to see, and what a stage is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from altiplano import spec
from altiplano.pipeline.events import EventLog
from altiplano.pipeline.ledger import Outputs, Record
from altiplano.pipeline.services import Services
from altiplano.pipeline.workspace import Workspace
from altiplano.registry import TrackedRun

KEY_LENGTH = 12


@dataclass
class Context:
    """One run of one pipeline. `records` grows stage by stage; `tracked` is the MLflow run of the present stage."""

    pipeline: spec.Pipeline
    workspace: Workspace
    services: Services
    events: EventLog
    parent: TrackedRun
    tracked: TrackedRun
    key: str = ""  # digest of the present stage's inputs
    records: dict[str, Record] = field(default_factory=dict)

    def outputs(self, stage: str) -> Outputs:
        """What an earlier stage left behind."""
        return self.records[stage].outputs

    def work_dir(self, stage: str) -> Path:
        """Where the present stage keeps what it goes on from after a kill: other inputs get another place."""
        return self.workspace.stage_dir(stage) / self.key[:KEY_LENGTH]

    def progress(self, stage: str, text: str, **fields: Any) -> None:
        """Tell whoever watches."""
        self.events.emit("progress", stage=stage, text=text, **fields)

    @property
    def registered_name(self) -> str:
        return self.pipeline.tracking.registered_model_name or self.pipeline.run.name


@dataclass(frozen=True)
class Stage:
    """A pure step: `inputs` is everything the result depends on, `run` makes it, `holds` says whether it is still true."""

    name: str
    inputs: Callable[[Context], dict[str, Any]]
    run: Callable[[Context], Outputs]
    summary: Callable[[Outputs], str]
    holds: Callable[[Context, Record], bool] = lambda context, record: True
