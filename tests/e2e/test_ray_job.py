"""The pipeline as a Ray job: submitted to a head with token authentication, followed to its end."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from altiplano.cluster import local_ray, processes
from altiplano.pipeline.summary import latest_run, summarize
from altiplano.registry.server import start_server

from .conftest import write_pipeline

ROOT = Path(__file__).parents[2]


@pytest.fixture
def head(tmp_path: Path) -> Iterator[local_ray.RayHead]:
    cluster = tmp_path / "cluster"
    yield local_ray.start(cluster, 6)
    local_ray.stop(cluster)


@pytest.mark.slow
def test_a_submitted_pipeline_runs_in_the_cluster(
    head: local_ray.RayHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert httpx.get(f"{head.dashboard}/api/jobs/").status_code == 401, "jobs are not for everybody"
    monkeypatch.setenv(processes.MARK, str((tmp_path / "cluster").resolve()))
    server = start_server(tmp_path / "mlflow", processes.free_port())
    file = write_pipeline(tmp_path, processes.free_port())
    submit = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "job",
        "submit",
        "--address",
        head.dashboard,
        "--working-dir",
        str(ROOT),
    ]
    entry = [sys.executable, "pipelines/finetune.py", str(file), f"tracking.tracking_uri={server.uri}"]
    environment = os.environ | local_ray.environment(tmp_path / "cluster")
    done = subprocess.run(
        [*submit, "--", *entry], env=environment, capture_output=True, text=True, timeout=800, stdin=subprocess.DEVNULL
    )
    log = done.stdout + done.stderr
    for stage in ("data", "tune", "train", "evaluate", "gate", "register", "deploy"):
        assert f"✓ {stage}" in log, log[-3000:]
    summary = summarize(latest_run(tmp_path / "work", "tiny"))
    assert summary["status"] == "finished" and summary["mlflow"] == server.uri
    assert (done.returncode == 0) == (summary["verdict"] == "promote")
