"""A real MLflow server on each kind of database."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from altiplano.cluster.processes import free_port
from altiplano.registry import Lineage
from altiplano.registry.server import ServerInfo, start_server


def stop(info: ServerInfo) -> None:
    """End the server that a test started, and its workers; wait until they are gone."""
    server = psutil.Process(info.pid)
    family = [server, *server.children(recursive=True)]
    os.killpg(info.pid, signal.SIGKILL)
    psutil.wait_procs(family, timeout=30)


def lineage(**facts: Any) -> Lineage:
    """A complete lineage; `facts` replace those that a test cares about."""
    known: dict[str, Any] = {
        "config_digest": "c",
        "base_model": "cria",
        "base_digest": "b",
        "base_revision": None,
        "dataset_digests": {"data": "d"},
        "template_digest": "t",
        "date_string": "26 Jul 2024",
        "mask_policy": "assistant_only",
        "seed": 1,
        "world_sizes": [2],
        "tokens_seen": 10,
        "adapter_digest": "a",
        "run_ids": {"train": "r"},
        "verdict": "promote",
    }
    return Lineage.gather(**known | facts)


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """URI of an empty database of a PostgreSQL server of our own."""
    found = [
        *Path("/usr/lib/postgresql").glob("*/bin"),
        *([Path(shutil.which("initdb") or "").parent] if shutil.which("initdb") else []),
    ]
    if not found:
        pytest.skip("no PostgreSQL here: install it (Debian: postgresql) to run this test")
    # PostgreSQL refuses to run as root, and its user must reach the folder.
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    directory = Path(tempfile.mkdtemp(prefix="altiplano-postgres-"))
    if as_user:
        shutil.chown(directory, "postgres")
    control, port = [*as_user, str(found[0] / "pg_ctl"), "-D", str(directory / "data")], free_port()
    subprocess.run([*control, "initdb", "-o", "-A trust -U altiplano"], check=True, capture_output=True, cwd="/")
    options = f"-p {port} -k {directory} -h 127.0.0.1 -c fsync=off"
    subprocess.run(
        [*control, "-l", str(directory / "log"), "-o", options, "-w", "-t", "240", "start"],
        check=True,
        stdout=subprocess.DEVNULL,
        cwd="/",
    )
    yield f"postgresql+psycopg://altiplano@127.0.0.1:{port}/postgres"
    subprocess.run([*control, "-m", "immediate", "stop"], check=True, capture_output=True, cwd="/")
    shutil.rmtree(directory)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerInfo]:
    """A server on SQLite, then one on PostgreSQL."""
    uri = request.getfixturevalue("database") if request.param == "postgresql" else None
    info = start_server(tmp_path_factory.mktemp("mlflow"), free_port(), uri)
    yield info
    stop(info)
