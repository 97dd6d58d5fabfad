"""The sweep as Ray Tune runs it: many trials, some stopped early, the best one's settings as the result."""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.tune
from ray.tune import Callback, ResultGrid, RunConfig, TuneConfig, Tuner
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import ConcurrencyLimiter

from altiplano import spec
from altiplano.train.sink import MetricSink
from altiplano.tune.job import TrialJob
from altiplano.tune.search import make_search


class SweepError(RuntimeError):
    """No trial finished."""


@dataclass(frozen=True)
class TrialRow:
    """One trial. `status`: waiting, running, finished, pruned or failed; `params` by dotted key."""

    id: str
    params: dict[str, Any]
    metric: float | None
    tokens: int
    status: str


@dataclass(frozen=True)
class SweepResult:
    """The best trial's settings (of those that ran to their end) and all trials."""

    best: dict[str, Any]
    best_metric: float
    trials: list[TrialRow]


def sweep(
    pipeline: spec.Pipeline,
    prepared_dir: Path,
    out: Path,
    *,
    trial_sink: Callable[[str, dict[str, Any]], MetricSink],
    on_update: Callable[[list[TrialRow]], None],
    name: str,
) -> SweepResult:
    """Run the sweep of `pipeline.tune`; ray.init has happened. The same `out` and `name` go on where a killed call was.

    Raises:
        SweepError: every trial failed; the message is that of the first.
    """
    tune = pipeline.tune
    assert tune is not None
    out.mkdir(parents=True, exist_ok=True)
    job = TrialJob(pipeline.model_dump(mode="json"), str(prepared_dir), trial_sink)
    resources = {"gpu": 1} if pipeline.scaling.use_gpu else {"cpu": pipeline.scaling.cpus_per_trial}
    trainable = ray.tune.with_resources(_named(job), resources)
    watch = _Watch(tune, on_update)
    path = str((out / name).resolve())
    tuner = _restored(path, trainable)
    if tuner is not None:
        tuner._local_tuner._run_config.callbacks = [watch]  # a stored experiment keeps nobody watching
    else:
        tuner = Tuner(
            trainable,
            tune_config=TuneConfig(
                search_alg=ConcurrencyLimiter(make_search(tune), max_concurrent=tune.max_concurrent_trials),
                scheduler=_scheduler(tune),
                num_samples=tune.num_samples,
                time_budget_s=tune.time_budget_s,
                reuse_actors=True,  # importing the training stack takes longer than a short trial
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=RunConfig(name=name, storage_path=str(out.resolve()), callbacks=[watch], verbose=0),
        )
    return _result(tuner.fit(), tune)


def _restored(path: str, trainable: Any) -> Tuner | None:
    """The experiment at `path` as a killed call left it; None when there is none. One that was killed while it was being
    written holds nothing that could go on: it is removed."""
    if not Tuner.can_restore(path):
        return None
    try:
        return Tuner.restore(path, trainable, resume_unfinished=True, resume_errored=True)
    except Exception as error:
        print(f"the sweep in {path} cannot be restored ({type(error).__name__}: {error}): it starts again", flush=True)
        shutil.rmtree(path)
        return None


def _scheduler(tune: spec.Tune) -> ASHAScheduler:
    asha = tune.scheduler
    return ASHAScheduler(
        time_attr=asha.time_attr,
        metric=tune.metric,
        mode=tune.mode,
        max_t=asha.max_t,
        grace_period=asha.grace_period,
        reduction_factor=asha.reduction_factor,
    )


class _Watch(Callback):
    """Tells `on_update` whenever a trial changes."""

    def __init__(self, tune: spec.Tune, on_update: Callable[[list[TrialRow]], None]) -> None:
        self._tune, self._on_update = tune, on_update

    def __reduce__(self) -> tuple[Any, ...]:
        # Ray Tune stores callbacks with the experiment; who watches is decided anew by every call.
        return (_Watch, (self._tune, _nobody))

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._tell(trials)

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any) -> None:
        self._tell(trials)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._tell(trials)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._tell(trials)

    def _tell(self, trials: list[Trial]) -> None:
        self._on_update([_row(_trial_name(t), t.config, t.last_result or {}, t.status, self._tune) for t in trials])


def _nobody(rows: list[TrialRow]) -> None:
    """Watches nothing."""


def _row(name: str, params: dict[str, Any], last: dict[str, Any], status: str, tune: spec.Tune) -> TrialRow:
    tokens = int(last.get("tokens_seen", 0))
    words = {"PENDING": "waiting", "RUNNING": "running", "PAUSED": "waiting", "ERROR": "failed"}
    ended = "finished" if tokens >= tune.scheduler.max_t else "pruned"
    metric = last.get(tune.metric)
    return TrialRow(
        name, dict(params), metric if metric is not None and math.isfinite(metric) else None, tokens, words.get(status, ended)
    )


def _result(grid: ResultGrid, tune: spec.Tune) -> SweepResult:
    rows = []
    for index in range(len(grid)):
        one = grid[index]
        rows.append(_row(Path(one.path).name, one.config or {}, one.metrics or {}, "ERROR" if one.error else "TERMINATED", tune))
    measured = [(row.metric, row) for row in rows if row.metric is not None]
    ended = [(metric, row) for metric, row in measured if row.status == "finished"] or measured
    if not ended:
        first = next((error for error in grid.errors), None)
        raise SweepError(f"no trial of the sweep finished; the first error: {first}")
    metric, best = min(ended, key=lambda pair: pair[0])
    return SweepResult(best.params, metric, rows)


def _trial_name(trial: Trial) -> str:
    """`trial-003` is the third that was suggested; Ray's own ids are random."""
    return f"trial-{int(trial.experiment_tag.split('_', 1)[0]):03d}"


def _named(job: TrialJob) -> Callable[[dict[str, Any]], None]:
    """Ray Tune names experiments after the function."""

    def trial(config: dict[str, Any]) -> None:
        from altiplano.tune.trial import run_trial  # the training stack: slow to import, and needed by trials only

        run_trial(config, job)

    return trial
