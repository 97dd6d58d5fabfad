"""A whole pipeline through the command line: killed on the way, run again, skipped, taken down."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from mlflow import MlflowClient

from altiplano.cluster import local_ray, processes
from altiplano.pipeline.events import read
from altiplano.registry import ModelRegistry

from . import mlflow_pages
from .conftest import not_here, write_pipeline

ALTIPLANO = [sys.executable, "-m", "altiplano.cli"]
HELD = [sys.executable, str(Path(__file__).with_name("held.py"))]
PATIENCE_S = 1200.0  # what takes longer has failed, on the busiest machine too
POLL = threading.Event()  # never set: gives the processor away between two looks
STAGES = ["data", "tune", "train", "evaluate", "gate", "register", "deploy"]


def altiplano(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*ALTIPLANO, *arguments], capture_output=True, text=True, timeout=PATIENCE_S, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def pipeline(workdir: Path) -> Iterator[Path]:
    yield write_pipeline(workdir, processes.free_port())
    local_ray.stop(workdir / "work")


class Attempt:
    """One `altiplano run` that stands still at a place; see held.py."""

    def __init__(self, file: Path, work: Path, place: str) -> None:
        self._work = work
        work.mkdir(exist_ok=True)
        (work / "held").unlink(missing_ok=True)
        (work / "hold").write_text(place)
        self._run = subprocess.Popen(
            [*HELD, "run", str(file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True
        )
        deadline = time.monotonic() + PATIENCE_S / 2
        while not (work / "held").exists():
            if self._run.poll() is not None:
                pytest.fail(f"the run ended too early: {self._run.communicate()[0]}")
            if time.monotonic() > deadline:
                pytest.fail(f"it has not got to {place!r}: {self._kill()}")
            POLL.wait(0.05)

    def kill_driver(self) -> None:
        """SIGKILL the detached driver: the command that shows it must notice."""
        lock = (self._work / "pipeline.lock").read_text()
        os.kill(int(lock.split("pid ")[1].rstrip(")")), signal.SIGKILL)
        assert self.go_on()[0] == 1

    def _kill(self) -> str:
        """SIGKILL the command and its driver; everything shown."""
        drivers = psutil.Process(self._run.pid).children()
        self._run.kill()
        for driver in drivers:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended a moment ago
                driver.kill()
        return self._run.communicate(timeout=PATIENCE_S / 2)[0]

    def go_on(self) -> tuple[int, str]:
        """Exit code and everything shown."""
        (self._work / "hold").unlink()
        shown, _ = self._run.communicate(timeout=PATIENCE_S)
        return self._run.returncode, shown


@pytest.mark.timeout(2 * PATIENCE_S)
def test_a_run_that_is_killed_in_every_stage_ends_with_each_stage_done_once(pipeline: Path, workdir: Path) -> None:
    work = workdir / "work"
    events = work / "tiny/events.jsonl"
    for stage in STAGES:
        attempt = Attempt(pipeline, work, "tune learning" if stage == "tune" else f"{stage} begun")
        attempt.kill_driver()
        if stage == "data":
            _fill_the_disk(pipeline, workdir)
        if stage == "train":
            _lose_mlflow_while_training(pipeline, work, events)

    last = altiplano("run", str(pipeline))
    assert last.returncode == 0, last.stderr + last.stdout
    finished = [event["stage"] for event in read(events)[0] if event["kind"] == "stage_finished"]
    assert finished == STAGES, "no stage that was finished may run twice"

    again = altiplano("run", str(pipeline))
    assert again.returncode == last.returncode
    done = [e for e in read(events)[0] if e["kind"] in ("stage_finished", "stage_skipped")][-7:]
    assert [e["kind"] for e in done] == ["stage_skipped"] * 7

    summary = json.loads(altiplano("status", "-w", str(work), "-o", "json").stdout)
    assert summary["status"] == "finished" and summary["verdict"] == "promote"
    assert _check_mlflow(summary["mlflow"]) == 1, "a run that was killed goes on in the same MLflow run"
    _check_pages(summary["mlflow"], workdir)
    _check_endpoint(summary["endpoint"], summary["chat"]["question"])


def _fill_the_disk(file: Path, workdir: Path) -> None:
    """A full disk is named; what was there stays."""
    if not workdir.is_mount():
        not_here("a small disk needs root")
        return
    ballast = workdir / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as stream:
        while True:
            stream.write(b"0" * 4096)
    done = altiplano("run", str(file))
    assert done.returncode == 6 and "no space left" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    ballast.unlink()


def _lose_mlflow_while_training(file: Path, work: Path, events: Path) -> None:
    """Training goes on without MLflow; what comes after refuses, and says why."""
    attempt = Attempt(file, work, "train learning")
    os.killpg(json.loads((work / "mlflow.json").read_text())["pid"], signal.SIGKILL)
    code, shown = attempt.go_on()
    assert code == 4 and "MLflow" in shown and "does not answer" in shown, shown
    assert "Traceback" not in shown
    assert [e["stage"] for e in read(events)[0] if e["kind"] == "stage_finished"] == ["data", "tune", "train"]


def _check_mlflow(uri: str) -> int:
    """The number of pipeline runs. The first has one pipeline run with one child per stage, trials below the sweep, and a registered version with its lineage."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    parents = [run for run in runs if run.data.tags["altiplano.stage"] == "pipeline"]
    count, parents = len(parents), parents[-1:]  # the first; one more for other settings
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert sorted(run.info.run_name for run in children) == sorted(STAGES)
    by_name = {run.info.run_name: run for run in children}
    trials = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == by_name["tune"].info.run_id]
    assert len(trials) == 2 and all("learning_rate=" in run.info.run_name for run in trials)
    assert {run.info.status for run in (*parents, *children, *trials)} <= {"FINISHED", "KILLED"}
    assert by_name["train"].data.params["lora.r"] == "8"
    # Measured while no server was there: kept, and sent when there was one again.
    losses = client.get_metric_history(by_name["train"].info.run_id, "train/loss")
    steps = sorted({metric.step for metric in losses})
    assert steps[0] == 1 and steps[1:] == list(range(2, steps[-1] + 1, 2))
    version = ModelRegistry(uri).versions("tiny")[-1]
    assert version.tags["gate"] and version.tags["adapter_digest"]
    return count


def _check_pages(uri: str, pictures: Path) -> None:
    """The run tree and the registry page, as a browser shows them."""
    if mlflow_pages.CHROMIUM is None:
        not_here("no Chromium: install the package chromium, or set CHROMIUM to its path")
        return
    runs, model = [*STAGES, "pipeline-tiny-", "learning_rate="], ["Version 1", "adapter_digest"]
    seen = mlflow_pages.look(uri, "tiny", "tiny", pictures, runs, model)
    assert all(name in seen.runs for name in runs) and all(name in seen.model for name in model)


def _check_endpoint(url: str, question: str) -> None:
    body = {"model": "champion", "messages": [{"role": "user", "content": question}], "max_tokens": 16}
    answer = httpx.post(f"{url}/chat/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["message"]["content"]


@pytest.mark.timeout(2 * PATIENCE_S)
def test_other_settings_train_another_adapter_that_meets_the_champion(pipeline: Path, workdir: Path) -> None:
    stages = workdir / "work/tiny/stages"
    before = json.loads((stages / "train.json").read_text())["outputs"]
    changed = altiplano("run", str(pipeline), "training.seed=7", "tune.num_samples=1")
    assert changed.returncode in (0, 3), changed.stderr
    after = {name: json.loads((stages / f"{name}.json").read_text())["outputs"] for name in STAGES}
    assert len(after["tune"]["trials"]) == 1
    assert after["train"]["adapter_digest"] != before["adapter_digest"]
    assert after["train"]["loss_curve"] != before["loss_curve"]
    assert after["evaluate"]["champion"] == 1 and after["gate"]["rival"] == "champion"
    assert after["register"]["version"] == 2
    assert not Path(before["adapter_path"]).exists(), "the work folders of other settings are gone"


@pytest.mark.timeout(2 * PATIENCE_S)
def test_down_stops_everything_of_this_workspace_and_nothing_else(pipeline: Path, workdir: Path) -> None:
    work = workdir / "work"
    until_killed = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    other = subprocess.Popen(until_killed, stdin=subprocess.PIPE, env=processes.mark(workdir / "other"))
    try:
        assert processes.marked(work), "the test before left servers running"
        assert altiplano("down", "-w", str(work)).returncode == 0
        assert processes.marked(work) == []
        assert other.poll() is None
        _come_back(work)
        assert altiplano("down", "-w", str(work)).stdout.strip() == "nothing was running"
    finally:
        other.kill()
        other.communicate()


def _come_back(work: Path) -> None:
    """`up` after `down`: the same runs in MLflow, and the champion at the same address if there is one."""
    shown = altiplano("up", "-w", str(work))
    assert shown.returncode == 0, shown.stderr
    summary = json.loads(altiplano("status", "-w", str(work), "-o", "json").stdout)
    _check_mlflow(summary["mlflow"])
    _check_endpoint(summary["endpoint"], summary["chat"]["question"])
    assert altiplano("down", "-w", str(work)).returncode == 0
    assert processes.marked(work) == []
