"""The sweep: find the settings of the final run with short trials."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from altiplano.pipeline.context import Context, Stage
from altiplano.pipeline.ledger import Outputs
from altiplano.registry import LateSink, MlflowSink, Tracker
from altiplano.train.sink import MetricSink
from altiplano.tune import TrialRow, sweep

# How a trial that Ray Tune ended appears in MLflow, whose word for "stopped early" is KILLED.
MLFLOW_STATUS = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}


@dataclass(frozen=True)
class TrialRuns:
    """Opens the MLflow run of a trial, in the trial's own process: picklable, and the same run when a trial is restarted."""

    tracking_uri: str
    experiment_name: str
    parent_run_id: str
    spool_dir: str

    def __call__(self, trial_id: str, params: dict[str, Any]) -> MetricSink:
        return LateSink(partial(self._open, trial_id, params))

    def _open(self, trial_id: str, params: dict[str, Any]) -> MlflowSink:
        settings = " ".join(f"{name.rsplit('.', 1)[-1]}={_short(value)}" for name, value in params.items())
        tracker = Tracker(self.tracking_uri, self.experiment_name, self.spool_dir)
        run = tracker.start_run(
            f"{trial_id} {settings}", "trial", parent_run_id=self.parent_run_id, params=params, tags={"altiplano.trial": trial_id}
        )
        return MlflowSink(self.tracking_uri, run.run_id, self.spool_dir)


def _inputs(context: Context) -> dict[str, Any]:
    pipeline = context.pipeline
    return {
        "data": context.outputs("data")["digest"],
        "model": pipeline.model.model_dump(mode="json"),
        "lora": pipeline.lora.model_dump(mode="json"),
        "training": pipeline.training.model_dump(mode="json"),
        "tune": pipeline.tune.model_dump(mode="json") if pipeline.tune else None,
    }


def _run(context: Context) -> Outputs:
    pipeline, tune = context.pipeline, context.pipeline.tune
    if tune is None:
        return {"best": {}, "best_metric": None, "trials": []}
    experiment = pipeline.tracking.experiment_name or pipeline.run.name
    runs = TrialRuns(context.services.tracking_uri, experiment, context.tracked.run_id, str(context.workspace.spool_dir))

    def show(rows: list[TrialRow]) -> None:
        running = sum(row.status == "running" for row in rows)
        done = sum(row.status in MLFLOW_STATUS for row in rows)
        context.progress("tune", f"{done} of {tune.num_samples} trials done, {running} running", trials=[asdict(r) for r in rows])

    result = sweep(
        pipeline,
        context.workspace.stage_dir("data"),
        context.work_dir("tune"),
        trial_sink=runs,
        on_update=show,
        name=pipeline.run.name,
    )
    show(result.trials)
    context.tracked.log_params({f"best.{name}": value for name, value in result.best.items()})
    context.tracked.log_metrics({f"best/{tune.metric}": result.best_metric}, step=0)
    context.tracked.log_dict([asdict(row) for row in result.trials], "trials.json")
    _close_trials(context, result.trials)
    return {"best": result.best, "best_metric": result.best_metric, "trials": [asdict(row) for row in result.trials]}


def _close_trials(context: Context, rows: list[TrialRow]) -> None:
    """Give every trial's MLflow run the end that the trial had."""
    children = context.tracked.children(tag="altiplano.trial")
    for row in rows:
        if row.id in children:
            children[row.id].end(MLFLOW_STATUS.get(row.status, "FINISHED"))


def _short(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def _summary(outputs: Outputs) -> str:
    if not outputs["trials"]:
        return "no sweep in this file: the written settings are used"
    pruned = sum(trial["status"] == "pruned" for trial in outputs["trials"])
    best = ", ".join(f"{name.rsplit('.', 1)[-1]}={_short(value)}" for name, value in outputs["best"].items())
    return f"{len(outputs['trials'])} trials, {pruned} stopped early; best {best} (loss {outputs['best_metric']:.3f})"


STAGE = Stage("tune", _inputs, _run, _summary)
