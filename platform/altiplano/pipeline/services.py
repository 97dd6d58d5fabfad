"""The servers that a pipeline needs: Ray and MLflow, found or started."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from altiplano import spec
from altiplano.cluster import local_ray, processes
from altiplano.pipeline.workspace import write_json
from altiplano.registry.server import MlflowServerError, ServerInfo, is_healthy, start_server

# Set by Ray inside a submitted job: the cluster is there already, and it is not ours to stop.
RAY_ADDRESS = "RAY_ADDRESS"


class ServiceError(RuntimeError):
    """Ray or MLflow cannot be used; the message says what to change."""

    exit_code = 4


@dataclass(frozen=True)
class Services:
    """What is running for a workspace. `ray` is None inside a cluster that somebody else runs."""

    tracking_uri: str
    ray: local_ray.RayHead | None


def ensure(tracking: spec.Tracking, root: Path, say: Callable[[str], None]) -> Services:
    """Services that answer, started where none is there, with this process connected to Ray.

    Raises:
        ServiceError: a server that the pipeline names does not answer, or ours cannot start.
    """
    os.environ[processes.MARK] = str(root.resolve())
    tracking_uri = _mlflow(tracking, root, say)
    head = None
    try:
        if RAY_ADDRESS not in os.environ:
            say("starting Ray")
            head = local_ray.start(root, local_ray.default_num_cpus())
        local_ray.connect(head)
    except (local_ray.RayStartError, ConnectionError) as error:
        raise ServiceError(str(error)) from error
    return Services(tracking_uri, head)


def find(root: Path) -> Services | None:
    """The services of a workspace that run now, or None."""
    uri, head = find_mlflow(root), local_ray.find(root)
    return Services(uri, head) if uri and head else None


def find_mlflow(root: Path) -> str | None:
    """Address of the workspace's own MLflow server if it answers."""
    try:
        info = ServerInfo(**json.loads(_mlflow_state(root).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return info.uri if is_healthy(info.uri) else None


def _mlflow(tracking: spec.Tracking, root: Path, say: Callable[[str], None]) -> str:
    configured = tracking.tracking_uri
    if configured is not None:
        if not is_healthy(configured):
            raise ServiceError(
                f"MLflow does not answer at {configured}: start it, or change tracking.tracking_uri (null: a server of our own)"
            )
        return configured
    running = find_mlflow(root)
    if running is not None:
        return running
    say("starting MLflow")
    try:
        info = start_server(root / "mlflow", _same_port(root), tracking.backend_store_uri)
    except MlflowServerError as error:
        raise ServiceError(str(error)) from error
    write_json(_mlflow_state(root), asdict(info))
    return info.uri


def _same_port(root: Path) -> int:
    """The port that this workspace's server had before, if it is free: links to it stay good."""
    try:
        port = int(json.loads(_mlflow_state(root).read_text())["uri"].rsplit(":", 1)[1])
        processes.require_free("127.0.0.1", port, "the port")
    except (OSError, ValueError, KeyError, TypeError, processes.PortBusyError):
        return processes.free_port()
    return port


def _mlflow_state(root: Path) -> Path:
    return root / "mlflow.json"
