"""Measurements on their way to MLflow: on disk first, then sent in order, kept while the server is away.

Each writer appends JSON lines to a file of its own, which it keeps locked, and a thread sends them. What a dead process left is
unlocked, on whatever machine it ran, and sent by the next one (`replay`). Sending twice changes nothing: MLflow keeps equal
metrics, params and tags once.
"""

import contextlib
import fcntl
import json
import logging
import os
import threading
import time
import uuid
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

SEND_INTERVAL_S = 0.5
YOUNG_S = 60.0
RETRY_INTERVAL_S = 2.0
METRICS_PER_CALL, PARAMS_PER_CALL = 1000, 100
logger = logging.getLogger(__name__)


def client(tracking_uri: str) -> MlflowClient:
    """A client that gives up within about a minute: whoever calls has a spool or a message for the user.

    Not in less: it asks again after silence, and a slow server that was asked twice opens two runs.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    return MlflowClient(tracking_uri)


class Spool:
    """Append-only for one process. `add` never blocks on the network and never raises for MLflow's sake."""

    def __init__(self, tracking_uri: str, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
        self._file = os.open(self._path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        weakref.finalize(self, os.close, self._file)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._uri = tracking_uri
        self._pending: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._busy = False
        self._thread: threading.Thread | None = None

    def add(self, operation: Mapping[str, Any]) -> None:
        """Queue {"run_id", and any of "metrics", "params", "tags", "artifact", "text" with "file", "status"}."""
        entry = {"uri": self._uri, **operation}
        with self._changed:
            self._keep(entry)
            self._pending.append(entry)
            if self._thread is None:
                self._thread = threading.Thread(target=self._send_forever, daemon=True, name="mlflow-spool")
                self._thread.start()
            self._changed.notify_all()

    def _keep(self, entry: dict[str, Any]) -> None:
        """On disk, so that it outlives this process. A full disk costs that safety only: the entry is still sent."""
        try:
            os.write(self._file, json.dumps(entry, default=str).encode() + b"\n")
        except OSError as error:
            logger.warning(
                "%s cannot be written (%s): what MLflow does not have when this process ends is lost", self._path, error
            )

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything is sent; False when it is not after `timeout_s` seconds (it stays on disk)."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self._pending or self._busy:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)
        return True

    def _send_forever(self) -> None:
        while True:
            with self._changed:
                while not self._pending:
                    self._changed.wait()
                batch, self._busy = list(self._pending), True
            sent = _send(client(self._uri), batch)
            with self._changed:
                del self._pending[: len(batch) if sent else 0]
                self._busy = False
                if not self._pending:
                    os.ftruncate(self._file, 0)
                self._changed.notify_all()
            time.sleep(SEND_INTERVAL_S if sent else RETRY_INTERVAL_S)


def replay(directory: Path, tracking_uri: str) -> int:
    """Send what ended processes left in `directory`; returns how many files went out. Files that cannot be sent stay.

    Entries go where their process would have sent them, or to `tracking_uri` when the server of their run has moved there.
    """
    done = 0
    for path in _oldest_first(directory):
        try:
            stream = path.open("r+")
        except FileNotFoundError:
            continue  # another process has sent it
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # its writer lives, or somebody else is sending it
            if os.fstat(stream.fileno()).st_nlink == 0:
                continue  # it was sent between our two looks
            entries = [json.loads(line) for line in stream.read().splitlines() if line.endswith("}")]
            if not entries and time.time() - os.fstat(stream.fileno()).st_mtime < YOUNG_S:
                continue  # its writer may be about to lock it
            if not entries or _send(client(entries[0]["uri"]), entries) or _send_moved(client(tracking_uri), entries):
                path.unlink(missing_ok=True)
                done += bool(entries)
    return done


def _oldest_first(directory: Path) -> list[Path]:
    written = dict[Path, float]()
    for path in directory.glob("*.jsonl"):
        with contextlib.suppress(FileNotFoundError):
            written[path] = path.stat().st_mtime
    return sorted(written, key=lambda path: written[path])


def _send_moved(to: MlflowClient, entries: list[dict[str, Any]]) -> bool:
    """Send to another server than the one that was named, if it knows all of the runs."""
    try:
        for run_id in {entry["run_id"] for entry in entries}:
            to.get_run(run_id)
    except (MlflowException, OSError):
        return False
    return _send(to, entries)


def _send(to: MlflowClient, entries: list[dict[str, Any]]) -> bool:
    """Send in order; False at the first entry that the server did not take for now."""
    for run_id, group in _by_run(entries):
        try:
            _send_run(to, run_id, group)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                logger.warning("MLflow refuses entries of run %s (%s): they are dropped", run_id, error)
                continue
            return False
        except OSError:
            return False
    return True


def _send_run(to: MlflowClient, run_id: str, group: list[dict[str, Any]]) -> None:
    metrics = [Metric(k, v, e["time"], e["step"]) for e in group for k, v in e.get("metrics", {}).items()]
    params = [Param(k, str(v)) for e in group for k, v in e.get("params", {}).items()]
    tags = [RunTag(k, str(v)) for e in group for k, v in e.get("tags", {}).items()]
    for start in range(0, len(metrics), METRICS_PER_CALL):
        to.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_CALL])
    for start in range(0, len(params), PARAMS_PER_CALL):
        _send_params(to, run_id, params[start : start + PARAMS_PER_CALL])
    if tags:
        to.log_batch(run_id, tags=tags)
    for entry in group:
        if "artifact" in entry and Path(entry["artifact"]).exists():
            to.log_artifact(run_id, entry["artifact"], entry.get("artifact_path"))
        if "text" in entry:
            to.log_text(run_id, entry["text"], entry["file"])
        if "status" in entry:
            to.set_terminated(run_id, entry["status"])


def _send_params(to: MlflowClient, run_id: str, params: list[Param]) -> None:
    """MLflow keeps the first value of a param. A run that goes on with another one must not lose everything else for it."""
    try:
        to.log_batch(run_id, params=params)
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        logger.warning("run %s keeps its first params: %s", run_id, error)


def _by_run(entries: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(entry["run_id"], []).append(entry)
    return list(groups.items())
