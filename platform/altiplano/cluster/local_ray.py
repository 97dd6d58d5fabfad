"""A Ray head of our own on this machine, apart from any other Ray that runs here.

It has its own temporary folder, its own ports on the loopback interface and its own token, so neither a user's cluster nor
another workspace can be confused with it.
"""

import hashlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from altiplano.cluster import processes

ATTEMPTS = 3


class RayStartError(RuntimeError):
    """The head did not come up; the message holds the end of Ray's own output."""


@dataclass(frozen=True)
class RayHead:
    """Where a head of ours listens."""

    address: str  # host:port of the GCS
    dashboard: str  # URL, needs the token
    temp_dir: str


def environment(workspace: Path) -> dict[str, str]:
    """What every process that talks to the head of `workspace` needs before it imports Ray, which reads these once."""
    workspace.mkdir(parents=True, exist_ok=True)
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(_token(workspace)),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray replaces print() otherwise, and libraries that disassemble code while hashing flood the log with it.
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Checkpoints are committed when the controller looks; the default of 2 s loses what a dying worker just reported.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    }


def start(workspace: Path, num_cpus: int) -> RayHead:
    """The running head of `workspace`, started now if there is none.

    Raises:
        RayStartError: it did not come up, several times.
    """
    running = find(workspace)
    if running is not None:
        return running
    workspace.mkdir(parents=True, exist_ok=True)
    # Ray gives its own processes 30 seconds, which a busy machine may not keep; and a port that was free may be taken meanwhile.
    for _ in range(ATTEMPTS):
        head = RayHead(
            address=f"127.0.0.1:{processes.free_port()}",
            dashboard=f"http://127.0.0.1:{processes.free_port()}",
            temp_dir=str(_temp_dir(workspace)),
        )
        others = {p.pid for p in processes.marked(workspace)}
        done = subprocess.run(
            _command(head, num_cpus),
            env=processes.mark(workspace) | environment(workspace),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode == 0:
            _state_file(workspace).write_text(json.dumps(asdict(head)))
            return head
        processes.stop([p for p in processes.marked(workspace) if p.pid not in others])
    raise RayStartError(f"Ray did not start (exit code {done.returncode}):\n{(done.stdout + done.stderr)[-2000:]}")


def find(workspace: Path) -> RayHead | None:
    """The head of `workspace` if it answers, else None."""
    try:
        head = RayHead(**json.loads(_state_file(workspace).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    host, port = head.address.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError:
        return None
    return head


def token(workspace: Path) -> str:
    """What the head of `workspace` asks for in `Authorization: Bearer`."""
    return _token(workspace).read_text()


def stop(workspace: Path) -> int:
    """End every process of `workspace`, remove Ray's temporary folder; returns how many processes were ended."""
    found = processes.marked(workspace)
    processes.stop(found)
    # A worker can fork between the look and the signal: look again until nothing is left.
    while left := processes.marked(workspace):
        processes.stop(left)
        found += left
    _state_file(workspace).unlink(missing_ok=True)
    shutil.rmtree(_temp_dir(workspace), ignore_errors=True)
    return len({p.pid for p in found})


def default_num_cpus() -> int:
    """Ray's logical CPUs: the cores, and at least 6, so that an idle endpoint never blocks a training run on a laptop."""
    return max(6, psutil.cpu_count() or 1)


def connect(head: RayHead | None, **arguments: Any) -> None:
    """Connect this process to `head`, or (None) to the cluster that the environment names: inside a Ray job.

    This process was started with `environment` (or set it before it imported Ray).
    """
    import ray  # slow, and its settings must be in the environment before

    ray.init(address=None if head is None else head.address, ignore_reinit_error=True, logging_level="WARNING", **arguments)


def _command(head: RayHead, num_cpus: int) -> list[str]:
    options = {
        "port": head.address.rsplit(":", 1)[1],
        "node-ip-address": "127.0.0.1",
        "include-dashboard": "true",  # or a head whose dashboard did not come up in time counts as started
        "dashboard-host": "127.0.0.1",
        "dashboard-port": head.dashboard.rsplit(":", 1)[1],
        "dashboard-agent-listen-port": str(processes.free_port()),
        # A raylet that has to be told these ports by its agents dies when they need 15 s to start, as on a busy machine.
        "dashboard-agent-grpc-port": str(processes.free_port()),
        "metrics-export-port": str(processes.free_port()),
        "runtime-env-agent-port": str(processes.free_port()),
        "ray-client-server-port": str(processes.free_port()),
        "temp-dir": head.temp_dir,
        "num-cpus": str(num_cpus),
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--disable-usage-stats", *flags]


def _token(workspace: Path) -> Path:
    """A fresh secret per workspace, readable by its owner only."""
    path = workspace.resolve() / "ray.token"
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_hex(32))
    return path


def _temp_dir(workspace: Path) -> Path:
    """Short, because Ray puts unix sockets under it and their paths end at 107 bytes."""
    name = hashlib.sha256(str(workspace.resolve()).encode()).hexdigest()[:10]
    return Path(tempfile.gettempdir()) / f"altiplano-{name}"


def _state_file(workspace: Path) -> Path:
    return workspace / "ray.json"
