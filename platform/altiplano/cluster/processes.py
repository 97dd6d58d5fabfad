"""Which processes of this machine belong to a workspace, and how they are ended.

Everything that a workspace starts inherits one environment variable. That mark survives daemons, new sessions and lost
pid files, and it never matches a process that somebody else started.
"""

import contextlib
import os
import random
import socket
from pathlib import Path

import psutil

MARK = "ALTIPLANO_WORKSPACE"
_QUIET_PORTS = range(20_000, 30_000)
_dealt = set[int]()  # by this process


class PortBusyError(RuntimeError):
    """Another program listens on a port that was asked for."""

    exit_code = 5


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on at this moment, and another one at every call.

    From a range that neither the kernel nor Ray deals from, so that it stays free until it is used.
    """
    for port in random.sample(_QUIET_PORTS, 200):
        if port in _dealt:
            continue  # whoever got it may not listen yet
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            _dealt.add(port)
            return port
    raise PortBusyError(f"of 200 ports from {_QUIET_PORTS.start} to {_QUIET_PORTS.stop - 1} none is free")


def require_free(host: str, port: int, setting: str) -> None:
    """Raise PortBusyError, naming the `setting` to change, when `port` cannot be bound."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortBusyError(
                f"{host}:{port} cannot be used ({error.strerror}): stop the program that listens there, or change {setting}"
            ) from error


def mark(workspace: Path) -> dict[str, str]:
    """The environment for a process of `workspace`: ours plus the mark."""
    return {**os.environ, MARK: str(workspace.resolve())}


def marked(workspace: Path) -> list[psutil.Process]:
    """Processes of `workspace`, without the calling process and its ancestors."""
    wanted = str(workspace.resolve())
    spared = {os.getpid(), *(p.pid for p in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid not in spared and process.environ().get(MARK) == wanted:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue  # gone meanwhile, or somebody else's
    return found


def stop(processes: list[psutil.Process], grace_s: float = 5.0) -> None:
    """SIGTERM, and SIGKILL for what is left after `grace_s` seconds. Returns when all are gone."""
    for process in processes:
        _signal(process, "terminate")
    _, alive = psutil.wait_procs(processes, timeout=grace_s)
    for process in alive:
        _signal(process, "kill")
    psutil.wait_procs(alive, timeout=grace_s)


def _signal(process: psutil.Process, how: str) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        getattr(process, how)()
