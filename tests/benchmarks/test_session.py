"""The one call that measures everything: it plans every figure that is on the page, and no program's end costs another's records."""

import fcntl
import importlib.util
import json
import shlex
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def session() -> Any:
    found = importlib.util.spec_from_file_location("session", ROOT / "benchmarks/engine/session.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["session"] = module
    found.loader.exec_module(module)
    return module


def option(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1] if name in arguments else ""


def test_every_workload_on_the_page_is_measured_again(session: Any) -> None:
    planned = set()
    for jobs in session.GROUPS.values():
        for job in jobs():
            assert (ROOT / job.arguments[0]).is_file() or job.arguments[0] == "-m"
            for workload in option(list(job.arguments), "--only").split(","):
                system = job.arguments[1] if "peers.py" in job.arguments[0] else "altiplano"
                planned.add((system, job.model, option(list(job.arguments), "--variant") or "bf16", workload))
    for record in json.loads((ROOT / "benchmarks/results/engine.json").read_text()):
        program, *arguments = shlex.split(record["command"])[1:]
        if program.endswith(("/workloads.py", "/peers.py")) and record["workload"] != "first-start":
            assert option(arguments, "--only") == record["workload"]
            assert (record["system"], record["model"], record["variant"], record["workload"]) in planned, record["command"]


# A program that keeps one record, says what it was given, and then does what the test wants.
PROGRAM = """
import fcntl, json, os, pathlib, sys, time
what, *given = sys.argv[1:]
out, commit = given[given.index("--out") + 1], given[given.index("--commit") + 1]
record = {"suite": "kernels", "kernel": what, "commit": commit, "gpu": os.environ["CUDA_VISIBLE_DEVICES"], "at": time.monotonic()}
pathlib.Path(out).write_text(json.dumps([record]))
print("said by", what)
if what == "fails":
    sys.exit(3)
if what == "hangs":
    fcntl.flock(lock := pathlib.Path(out).with_suffix(".lock").open("w"), fcntl.LOCK_EX)
    if os.fork():
        pathlib.Path(out).with_suffix(".hangs").touch()
    while True:
        time.sleep(1)
"""


@pytest.fixture
def measured(session: Any, tmp_path: Path) -> Any:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def run(names: dict[str, str], gpus: list[str], over: Any = None) -> tuple[dict[str, str], dict[str, Any]]:
        jobs = [session.Job(name, model, [str(program), name]) for name, model in names.items()]
        ends = session.run(jobs, gpus, tmp_path / "out", "abc", sys.executable, over or threading.Event())
        records = json.loads((tmp_path / "out/records.json").read_text())
        return ends, {record["kernel"]: record for record in records}

    return run


def test_each_model_has_a_gpu_and_one_program_at_a_time(measured: Any, tmp_path: Path) -> None:
    ends, records = measured({"a": "1b", "fails": "1b", "b": "3b", "c": "1b"}, ["0", "1"])
    assert ends == {"a": "green", "fails": "exit 3", "b": "green", "c": "green"}
    assert {name: record["gpu"] for name, record in records.items()} == {"a": "0", "fails": "0", "b": "1", "c": "0"}
    assert records["a"]["at"] < records["fails"]["at"] < records["c"]["at"]
    assert {record["commit"] for record in records.values()} == {"abc"}
    assert (tmp_path / "out/fails.log").read_text() == "said by fails\n"


def test_one_gpu_takes_both_models(measured: Any) -> None:
    _, records = measured({"a": "1b", "b": "3b"}, ["7"])
    assert {record["gpu"] for record in records.values()} == {"7"}


def test_what_outlasts_the_session_is_ended_with_its_processes_and_its_records_are_kept(measured: Any, tmp_path: Path) -> None:
    class OverOnceItHangs(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if (tmp_path / "out/hangs.hangs").exists():
                self.set()
            return super().wait(timeout)

    ends, records = measured({"hangs": "1b", "late": "1b"}, ["0"], OverOnceItHangs())
    assert ends == {"hangs": "out of time", "late": "not started"}
    assert list(records) == ["hangs"]
    with (tmp_path / "out/hangs.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as soon as nobody has it any more
