"""A whole pipeline through the command line: killed on the way, run again, skipped, taken down."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from mlflow import MlflowClient

from altiplano.cluster import local_ray, processes
from altiplano.pipeline.events import read
from altiplano.registry import ModelRegistry

from .conftest import write_pipeline

ALTIPLANO = [sys.executable, "-m", "altiplano.cli"]
POLL = threading.Event()  # never set: gives the processor away between two looks at the file
STAGES = ["data", "tune", "train", "evaluate", "gate", "register", "deploy"]


def altiplano(*arguments: str, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*ALTIPLANO, *arguments], capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def pipeline(workdir: Path) -> Iterator[Path]:
    yield write_pipeline(workdir, processes.free_port())
    local_ray.stop(workdir / "work")


def kill_driver_at(events: Path, run: "subprocess.Popen[bytes]", stage: str) -> None:
    """SIGKILL the detached driver as soon as `stage` has started."""
    offset = 0
    while True:
        found, offset = read(events, offset)
        if any(event["kind"] == "stage_started" and event["stage"] == stage for event in found):
            break
        assert run.poll() is None, f"the run ended before {stage}"
        POLL.wait(0.05)
    lock = (events.parents[1] / "pipeline.lock").read_text()
    os.kill(int(lock.split("pid ")[1].rstrip(")")), signal.SIGKILL)
    run.wait(timeout=60)


@pytest.mark.timeout(900)
def test_a_killed_run_goes_on_and_a_finished_one_is_skipped(pipeline: Path, workdir: Path) -> None:
    work = workdir / "work"
    events = work / "tiny/events.jsonl"
    first = subprocess.Popen([*ALTIPLANO, "run", str(pipeline)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kill_driver_at(events, first, "train")
    assert first.returncode == 1

    second = altiplano("run", str(pipeline))
    assert second.returncode in (0, 3), second.stderr
    runs = read(events)[0]
    finished = [event["stage"] for event in runs if event["kind"] == "stage_finished"]
    assert finished == STAGES, "no stage that was finished may run twice"

    third = altiplano("run", str(pipeline))
    assert third.returncode == second.returncode
    last = [e for e in read(events)[0] if e["kind"] in ("stage_finished", "stage_skipped")][-7:]
    assert [e["kind"] for e in last] == ["stage_skipped"] * 7

    summary = json.loads(altiplano("status", "-w", str(work), "-o", "json").stdout)
    assert summary["status"] == "finished" and summary["verdict"] in ("promote", "reject", "inconclusive")
    _check_mlflow(summary["mlflow"])
    if summary["verdict"] == "promote":
        _check_endpoint(summary["endpoint"], summary["chat"]["question"])


def _check_mlflow(uri: str) -> None:
    """One pipeline run with one child per stage, trials below the sweep, and a registered version with its lineage."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    parents = [run for run in runs if run.data.tags["altiplano.stage"] == "pipeline"]
    assert len(parents) == 1, "a run that was killed goes on in the same MLflow run"
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert sorted(run.info.run_name for run in children) == sorted(STAGES)
    by_name = {run.info.run_name: run for run in children}
    trials = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == by_name["tune"].info.run_id]
    assert len(trials) == 2 and all("learning_rate=" in run.info.run_name for run in trials)
    assert {run.info.status for run in (*parents, *children, *trials)} <= {"FINISHED", "KILLED"}
    assert by_name["train"].data.params["lora.r"] == "8"
    assert len(client.get_metric_history(by_name["train"].info.run_id, "train/loss")) >= 3
    (version,) = ModelRegistry(uri).versions("tiny")
    assert version.tags["gate"] and version.tags["adapter_digest"]


def _check_endpoint(url: str, question: str) -> None:
    body = {"model": "champion", "messages": [{"role": "user", "content": question}], "max_tokens": 16}
    answer = httpx.post(f"{url}/chat/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["message"]["content"]


@pytest.mark.timeout(300)
def test_down_stops_everything_of_this_workspace_and_nothing_else(pipeline: Path, workdir: Path) -> None:
    work = workdir / "work"
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=processes.mark(workdir / "other"))
    try:
        assert processes.marked(work), "the test before left servers running"
        assert altiplano("down", "-w", str(work)).returncode == 0
        assert processes.marked(work) == []
        assert other.poll() is None
        assert altiplano("down", "-w", str(work)).stdout.strip() == "nothing was running"
    finally:
        other.kill()
        other.wait()
