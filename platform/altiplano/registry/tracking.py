"""The run tree in MLflow: pipeline → stages → trials, with names that a person understands."""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlflow.data.http_dataset_source import HTTPDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, Run
from mlflow.exceptions import MlflowException

from altiplano.registry.models import RegistryUnavailableError
from altiplano.registry.spool import Spool, client, replay

PARENT = "mlflow.parentRunId"
STAGE = "altiplano.stage"
# Tags that make a run findable again: a trial by its id, a stage or pipeline by the digest of its inputs.
KEY, TRIAL = "altiplano.key", "altiplano.trial"
KEYS = (TRIAL, KEY)
RETRY_OPEN_S = 10.0
logger = logging.getLogger(__name__)


class Tracker:
    """Opens runs of one experiment. Only opening needs the server; what runs report goes through the spool.

    Raises:
        RegistryUnavailableError: the server does not answer.
    """

    def __init__(self, tracking_uri: str, experiment_name: str, spool_dir: str) -> None:
        self._client, self._spool_dir = client(tracking_uri), Path(spool_dir)
        self._spool = Spool(tracking_uri, self._spool_dir)
        self._uri = tracking_uri
        try:
            replay(self._spool_dir, tracking_uri)
            found = self._client.get_experiment_by_name(experiment_name)
            self._experiment = found.experiment_id if found else self._client.create_experiment(experiment_name)
        except (MlflowException, OSError) as error:
            raise RegistryUnavailableError(
                f"MLflow at {tracking_uri} does not answer ({error}): start it, or change tracking.tracking_uri"
            ) from error

    def start_run(
        self,
        name: str,
        kind: str,
        *,
        parent_run_id: str | None = None,
        run_id: str | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> "TrackedRun":
        """A new run, or (`run_id`) the one that an interrupted attempt began, running again."""
        labels = {STAGE: kind, **(tags or {})} | ({PARENT: parent_run_id} if parent_run_id else {})
        try:
            run = (
                self._resume(run_id)
                or self._same_tag(labels)
                or self._client.create_run(self._experiment, tags=labels, run_name=name)
            )
        except (MlflowException, OSError) as error:
            raise RegistryUnavailableError(
                f"MLflow at {self._uri} does not answer ({error}): start it and run the same command again"
            ) from error
        tracked = TrackedRun(self._uri, run.info.run_id, self._spool)
        if params:
            tracked.log_params(params)
        return tracked

    def flush(self, timeout_s: float) -> bool:
        """Send everything, of ended processes too; False when something has to wait for the next time."""
        replay(self._spool_dir, self._uri)
        return self._spool.flush(timeout_s)

    def _resume(self, run_id: str | None) -> Run | None:
        if run_id is None:
            return None
        try:
            self._client.update_run(run_id, status="RUNNING")
            return self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None  # another server than the one of the first attempt
            raise

    def _same_tag(self, labels: Mapping[str, str]) -> Run | None:
        """The run with the same parent and key: whoever opened it may have been killed before it could note the run's id."""
        key = next((name for name in KEYS if name in labels), None)
        if key is None:
            return None
        wanted = {name: labels[name] for name in (PARENT, key) if name in labels}
        condition = " AND ".join(f"tags.`{name}` = '{value}'" for name, value in wanted.items())
        found = self._client.search_runs([self._experiment], condition, max_results=1)
        return self._resume(found[0].info.run_id) if found else None


class TrackedRun:
    """One run. Nothing here blocks on the server or fails because of it, but for `children`."""

    def __init__(self, tracking_uri: str, run_id: str, spool: Spool) -> None:
        self.run_id, self._uri, self._spool = run_id, tracking_uri, spool

    def log_params(self, params: Mapping[str, Any]) -> None:
        self._spool.add({"run_id": self.run_id, "params": {k: _text(v) for k, v in params.items()}})

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self._spool.add({"run_id": self.run_id, "metrics": dict(metrics), "step": step, "time": int(time.time() * 1000)})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._spool.add({"run_id": self.run_id, "tags": dict(tags)})

    def log_artifact(self, path: Path, artifact_path: str | None = None) -> None:
        """Upload a file; it must stay where it is until it is sent."""
        self._spool.add({"run_id": self.run_id, "artifact": str(path), "artifact_path": artifact_path})

    def log_dict(self, value: Any, name: str) -> None:
        """Upload `value` as a JSON file called `name`."""
        self._spool.add({"run_id": self.run_id, "text": json.dumps(value, indent=1, default=str), "file": name})

    def log_dataset(self, *, name: str, digest: str, source: str, rows: int, context: str) -> None:
        """Show a data set, by its digest, among the run's inputs."""
        dataset = MetaDataset(HTTPDatasetSource(f"file://{source}"), name=name, digest=digest[:36])
        entity = DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", context)])
        # The digest is in the params too: a missing link in the UI must not stop a run.
        with contextlib.suppress(MlflowException, OSError):
            client(self._uri).log_inputs(self.run_id, [entity])
        self.log_params({f"dataset.{name}.digest": digest[:16], f"dataset.{name}.rows": rows})

    def children(self, tag: str) -> dict[str, "TrackedRun"]:
        """Child runs by the value of `tag`; empty when the server is away."""
        try:
            to = client(self._uri)
            experiment = to.get_run(self.run_id).info.experiment_id
            found = to.search_runs([experiment], f"tags.`{PARENT}` = '{self.run_id}'", max_results=1000)
        except (MlflowException, OSError):
            return {}
        return {r.data.tags[tag]: TrackedRun(self._uri, r.info.run_id, self._spool) for r in found if tag in r.data.tags}

    def end(self, status: str) -> None:
        """FINISHED, FAILED or KILLED."""
        self._spool.add({"run_id": self.run_id, "status": status})


class MlflowSink:
    """Metrics of a training process, picklable: each process that gets one has a spool of its own."""

    def __init__(self, tracking_uri: str, run_id: str, spool_dir: str) -> None:
        self._uri, self.run_id, self._spool_dir = tracking_uri, run_id, spool_dir
        self._run: TrackedRun | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (MlflowSink, (self._uri, self.run_id, self._spool_dir))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self._tracked().log_metrics(metrics, step)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._tracked().set_tags(tags)

    def _tracked(self) -> TrackedRun:
        if self._run is None:
            self._run = TrackedRun(self._uri, self.run_id, Spool(self._uri, Path(self._spool_dir)))
        return self._run


class LateSink:
    """A sink whose run is opened by the first call that finds the server; what comes before waits in memory."""

    def __init__(self, open_run: Callable[[], MlflowSink]) -> None:
        self._open = open_run
        self._sink: MlflowSink | None = None
        self._waiting: list[Callable[[MlflowSink], None]] = []
        self._next_try = 0.0
        self._pass_on(lambda sink: None)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        kept = dict(metrics)
        self._pass_on(lambda sink: sink.log_metrics(kept, step))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        kept = dict(tags)
        self._pass_on(lambda sink: sink.set_tags(kept))

    def _pass_on(self, call: Callable[[MlflowSink], None]) -> None:
        self._waiting.append(call)
        if self._sink is None and time.monotonic() >= self._next_try:
            try:
                self._sink = self._open()
            except RegistryUnavailableError as error:
                logger.warning("measurements wait for MLflow: %s", error)
                self._next_try = time.monotonic() + RETRY_OPEN_S
        if self._sink is not None:
            for waiting in self._waiting:
                waiting(self._sink)
            self._waiting.clear()


def _text(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
