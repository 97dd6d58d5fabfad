"""`altiplano up`: the services of a workspace without running a pipeline, and the endpoint as it was."""

import json
from collections.abc import Callable
from pathlib import Path

from altiplano import spec
from altiplano.cluster import local_ray
from altiplano.pipeline import services
from altiplano.pipeline.ledger import Ledger
from altiplano.pipeline.stages.deploy import redeploy
from altiplano.pipeline.summary import NoRunError, latest_run
from altiplano.pipeline.workspace import Workspace


def bring_up(root: Path, say: Callable[[str], None]) -> list[tuple[str, str]]:
    """Start what does not run and return (label, address) of everything that runs.

    Raises:
        ServiceError: Ray or MLflow cannot start.
    """
    try:
        place = latest_run(root, None)
        pipeline = spec.Pipeline.model_validate(json.loads(place.pipeline_file.read_text()))
    except (NoRunError, FileNotFoundError):
        pipeline = None
    workspace = Workspace(root, pipeline.run.name if pipeline else "services")
    workspace.spool_dir.mkdir(parents=True, exist_ok=True)
    running = services.ensure(pipeline.tracking if pipeline else spec.Tracking(), root, say)
    lines = [("MLflow", running.tracking_uri)]
    head = local_ray.find(root)
    if head is not None:
        lines.append(("Ray", head.dashboard))
    record = Ledger(workspace).latest("deploy") if pipeline else None
    if pipeline is not None and record is not None and record.outputs["url"]:
        say(f"deploying version {record.outputs['version']}")
        redeploy(pipeline, record, running, root)
        lines.append(("endpoint", record.outputs["url"]))
    return lines
