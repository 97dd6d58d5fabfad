"""Run the stages of a pipeline in order, skipping what is finished."""

import shutil
import time
import traceback
from typing import Any

from altiplano import spec
from altiplano.pipeline import services
from altiplano.pipeline.context import KEY_LENGTH, Context, Stage
from altiplano.pipeline.events import EventLog
from altiplano.pipeline.ledger import Ledger, Record, digest
from altiplano.pipeline.stages import STAGES
from altiplano.pipeline.workspace import Workspace
from altiplano.registry import Tracker
from altiplano.registry.tracking import KEY


class StageError(RuntimeError):
    """A stage failed; `cause` is what it raised."""

    def __init__(self, stage: str, cause: BaseException) -> None:
        super().__init__(f"{stage}: {root_cause(cause)}")
        self.stage, self.cause = stage, cause


def run_pipeline(pipeline: spec.Pipeline, workspace: Workspace, events: EventLog) -> dict[str, Record]:
    """Bring every stage of `pipeline` to its end and return their records.

    The caller holds the workspace's lock.

    Raises:
        StageError: a stage failed; earlier stages keep their results, a later run goes on at this one.
        ServiceError: Ray or MLflow could not be started or reached.
    """
    events.emit("run_started", run=pipeline.run.name, stages=[stage.name for stage in STAGES])
    running = services.ensure(
        pipeline.tracking, workspace.root, lambda text: events.emit("progress", stage="services", text=text)
    )
    ledger = Ledger(workspace)
    identity = digest(pipeline.model_dump(mode="json"))
    tracker = Tracker(running.tracking_uri, pipeline.tracking.experiment_name or pipeline.run.name, str(workspace.spool_dir))
    parent = tracker.start_run(
        f"pipeline-{pipeline.run.name}-{identity[:7]}",
        "pipeline",
        run_id=ledger.begun("pipeline", identity),
        tags={"altiplano.config_digest": identity, KEY: identity},
    )
    ledger.begin("pipeline", identity, parent.run_id)
    parent.log_dict(pipeline.model_dump(mode="json"), "pipeline.json")
    context = Context(pipeline, workspace, running, events, parent, parent)
    try:
        for stage in STAGES:
            _advance(stage, context, ledger, tracker)
    except BaseException:
        parent.end("FAILED")
        tracker.flush(timeout_s=20)
        raise
    parent.end("FINISHED")
    tracker.flush(timeout_s=60)
    return context.records


def _advance(stage: Stage, context: Context, ledger: Ledger, tracker: Tracker) -> None:
    """Bring one stage to its end, in the MLflow run of an earlier unfinished attempt if there is one."""
    context.tracked = context.parent
    try:
        key = digest({"stage": stage.name, **stage.inputs(context)})
        done = ledger.finished(stage.name, key)
        if done is not None and stage.holds(context, done):
            context.records[stage.name] = done
            context.events.emit("stage_skipped", stage=stage.name, summary=stage.summary(done.outputs))
            return
        context.events.emit("stage_started", stage=stage.name)
        context.key = key
        started = time.monotonic()
        context.tracked = tracker.start_run(
            stage.name, stage.name, parent_run_id=context.parent.run_id, run_id=ledger.begun(stage.name, key), tags={KEY: key}
        )
        ledger.begin(stage.name, key, context.tracked.run_id)
        outputs = stage.run(context)
    except BaseException as error:
        context.events.emit("stage_failed", stage=stage.name, error=root_cause(error), detail=traceback.format_exc())
        if context.tracked is not context.parent:
            context.tracked.end("FAILED")
        raise StageError(stage.name, error) from error
    record = Record(stage.name, key, outputs, time.monotonic() - started, context.tracked.run_id)
    context.tracked.end("FINISHED")
    ledger.finish(record)
    _forget_other_inputs(context, stage.name)
    context.records[stage.name] = record
    context.events.emit("stage_finished", stage=stage.name, seconds=record.seconds, summary=stage.summary(outputs))


def _forget_other_inputs(context: Context, stage: str) -> None:
    """Drop the work folders of earlier settings, now that these are done."""
    for folder in context.workspace.stage_dir(stage).glob("[0-9a-f]" * KEY_LENGTH):
        if folder != context.work_dir(stage):
            shutil.rmtree(folder, ignore_errors=True)


def root_cause(error: BaseException) -> str:
    """The message of the innermost error, or of the outermost of ours: Ray wraps what a worker raised in several layers."""
    seen: Any = error
    while not _is_ours(seen):
        inner = getattr(seen, "cause", None) or seen.__cause__
        if not isinstance(inner, BaseException):
            break
        seen = inner
    text = str(seen).strip() or type(seen).__name__
    return text if isinstance(seen, (ValueError, RuntimeError, OSError)) else f"{type(seen).__name__}: {text}"


def _is_ours(error: BaseException) -> bool:
    """Whether it was written for people, with what to change."""
    return type(error).__module__.startswith("altiplano.")
