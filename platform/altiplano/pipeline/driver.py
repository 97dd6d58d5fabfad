"""The process that runs a pipeline: it outlives the command that started it.

`python -m altiplano.pipeline.driver` reads {"root": …, "pipeline": {…}} from standard input, answers with one line on standard
output ("ready", or why not), and writes everything after that to the run's event file.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

from altiplano import spec
from altiplano.pipeline.events import EventLog
from altiplano.pipeline.outcome import FAILED, NO_SPACE, OK, finish
from altiplano.pipeline.run import StageError, run_pipeline
from altiplano.pipeline.services import ServiceError
from altiplano.pipeline.workspace import READY, Workspace, WorkspaceBusyError, WorkspaceError, write_json


def run(pipeline: spec.Pipeline, workspace: Workspace, events: EventLog) -> int:
    """Run `pipeline` under the workspace's lock, which the caller holds; returns the exit code of the run."""
    try:
        write_json(workspace.pipeline_file, pipeline.model_dump(mode="json"))
        records = run_pipeline(pipeline, workspace, events)
    except Exception as error:
        code = finish(error)
        ours = isinstance(error, (StageError, ServiceError, WorkspaceError))
        text = workspace.no_space if code == NO_SPACE else str(error) if ours else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):  # on a full disk; whoever follows the events looks at the disk too
            events.emit("run_finished", code=code, error=text)
        if code == FAILED and not ours:
            raise
        return code
    code = OK if records["gate"].outputs["decision"] == "promote" else finish(None)
    events.emit("run_finished", code=code)
    return code


def main() -> int:
    """Entry point of the detached process."""
    request = json.load(sys.stdin)
    pipeline = spec.Pipeline.model_validate(request["pipeline"])
    workspace = Workspace(Path(request["root"]), pipeline.run.name)
    try:
        with workspace.locked():
            events = EventLog(workspace.events_file)
            print(READY, flush=True)
            os.close(1)  # whoever started us need not stay to read
            os.dup2(2, 1)
            return run(pipeline, workspace, events)
    except (WorkspaceBusyError, WorkspaceError) as error:
        print(error, flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
