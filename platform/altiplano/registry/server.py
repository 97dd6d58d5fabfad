"""An MLflow server of our own on this machine."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

START_TIMEOUT_S = 120.0
# Its kernel takes connections while it stands still on a busy machine: then it must not be taken for gone.
CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S = 5.0, 30.0
# Servers outlive us on purpose; without this reference Python warns that they are still running.
_detached: list[subprocess.Popen[bytes]] = []


class MlflowServerError(RuntimeError):
    """The server did not come up; the message holds the end of its log."""


@dataclass(frozen=True)
class ServerInfo:
    """A running server."""

    uri: str
    pid: int
    log: str


def start_server(directory: Path, port: int, backend_store_uri: str | None = None) -> ServerInfo:
    """Start a server on 127.0.0.1:`port` that keeps runs in `backend_store_uri` (default: SQLite in `directory`) and artifacts in
    `directory`, and wait until it answers. It lives on when this process ends.

    Raises:
        MlflowServerError: the port is taken, the database does not answer, or the server died.
    """
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "server.log"
    uri = f"http://127.0.0.1:{port}"
    _check_port(port)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", backend_store_uri or f"sqlite:///{directory.resolve()}/mlflow.db"]
    command += ["--serve-artifacts", "--artifacts-destination", str(directory.resolve() / "artifacts")]
    # Without this the server starts eight processes more, for jobs that nobody submits to it.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with log.open("a") as stream:
        server = subprocess.Popen(
            command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if is_healthy(uri):
            _detached.append(server)
            return ServerInfo(uri, server.pid, str(log))
        if server.poll() is not None:
            break
        time.sleep(0.1)
    server.kill()
    raise MlflowServerError(f"MLflow did not start on {uri}; the end of {log}:\n{log.read_text(errors='replace')[-1500:]}")


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as the server will do: a closed one's TIME_WAIT is no obstacle
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise MlflowServerError(f"port {port} is taken ({error.strerror}): choose another port") from error


def is_healthy(uri: str) -> bool:
    """Whether an MLflow server answers at `uri`."""
    try:
        timeout = httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        return httpx.get(f"{uri}/health", timeout=timeout).status_code == 200
    except httpx.HTTPError:
        return False
