"""All numbers of the engine in one call: the programs of this folder one after the other, each model on a GPU of its own where there are two.

usage: python benchmarks/engine/session.py GROUP… --out FOLDER --commit HASH [--gpus 0,1] [--seconds S] [--python FILE]
       GROUP: tests, workloads, variants, kernels, quality, start, vllm, sglang; --python: the interpreter that has a peer's package

A program's output goes to FOLDER/NAME.log; all records to FOLDER/records.json, for benchmarks/keep.py; outcomes of the feature matrix to
FOLDER/features.json. What still runs S seconds after the call is ended, and the records that it has made until then are kept.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("1b", "3b")
BF16 = "W1,W2-B8,W2-B64,W2-B256,W4,W3-256,W3-1024"
VARIANTS = {
    "1b": {
        "kv-fp8": "W2-B64,W2-B256,W2-B256-2048,W4",
        "kv-int8": "W2-B64,W2-B256,W2-B256-2048,W4",
        "w-int8": "W1,W2-B8",
        "w-int4": "W1,W2-B8",
        "w8a8-fp8": "W2-B64,W2-B256,W4",
        "deterministic": "W1,W2-B64,W4",
        "lora": "W1",
        "lora-8": "W2-B8",
    },
    "3b": {"kv-fp8": "W2-B64,W2-B256,W2-B256-2048", "w-int8": "W1,W2-B8", "w-int4": "W1,W2-B8"},
}
PYTEST = ("-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-W", "ignore", "-c", "/dev/null", "--rootdir=.",
          "--import-mode=importlib", "--tb=short")  # fmt: skip
MATRIX = "tests/gpu/test_feature_matrix.py"


@dataclass(frozen=True)
class Job:
    """A program and its arguments, run from the repository's root on the GPU of `model`; `records`: whether it takes --out and --commit."""

    name: str
    model: str
    arguments: Sequence[str]
    records: bool = True


def _tests() -> list[Job]:
    return [
        Job("tests", "1b", [*PYTEST, "tests/gpu", f"--ignore={MATRIX}"], records=False),
        Job("matrix", "3b", [*PYTEST, MATRIX], records=False),
    ]


def _workloads() -> list[Job]:
    return [Job(f"workloads-{m}", m, ["benchmarks/engine/workloads.py", m, "--only", f"{BF16},W2-B256-2048"]) for m in MODELS]


def _variants() -> list[Job]:
    program = "benchmarks/engine/workloads.py"
    return [
        Job(f"workloads-{model}-{variant}", model, [program, model, "--variant", variant, "--only", only])
        for model, variants in VARIANTS.items()
        for variant, only in variants.items()
    ]


def _each(program: str, *, option: bool = False) -> list[Job]:
    return [Job(f"{program}-{m}", m, [f"benchmarks/engine/{program}.py", *(["--model"] if option else []), m]) for m in MODELS]


def _peer(system: str) -> list[Job]:
    return [Job(f"{system}-{m}", m, ["benchmarks/engine/peers.py", system, m, "--only", BF16]) for m in MODELS]


GROUPS: dict[str, Callable[[], list[Job]]] = {
    "tests": _tests,
    "workloads": _workloads,
    "variants": _variants,
    "kernels": lambda: _each("kernels", option=True),
    "quality": lambda: _each("quality"),
    "start": lambda: _each("cold_start"),
    "vllm": lambda: _peer("vllm"),
    "sglang": lambda: _peer("sglang"),
}


def run(jobs: Sequence[Job], gpus: Sequence[str], out: Path, commit: str, python: str, over: threading.Event) -> dict[str, str]:
    """Run all jobs, one at a time on each GPU, until `over` is set; says how each ended: "green", "exit N", "out of time" or "not started"."""
    out.mkdir(parents=True, exist_ok=True)
    ends = {job.name: "not started" for job in jobs}

    def work(gpu: str, queue: Sequence[Job]) -> None:
        for job in queue:
            if not over.is_set():
                began = time.monotonic()
                ends[job.name] = _run(job, gpu, out, commit, python, over)
                print(f"{job.name} on GPU {gpu}: {ends[job.name]} after {time.monotonic() - began:.0f} s", flush=True)

    queues = {gpu: [job for job in jobs if gpus[MODELS.index(job.model) % len(gpus)] == gpu] for gpu in gpus}
    threads = [threading.Thread(target=work, args=queue) for queue in queues.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = [record for job in jobs if (file := out / f"{job.name}.json").exists() for record in json.loads(file.read_text())]
    (out / "records.json").write_text(json.dumps(records, indent=1) + "\n")
    return ends


def _run(job: Job, gpu: str, out: Path, commit: str, python: str, over: threading.Event) -> str:
    written = ["--out", str(out / f"{job.name}.json"), "--commit", commit] if job.records else []
    environment = {
        "CUDA_VISIBLE_DEVICES": gpu,
        "PYTHONPATH": os.pathsep.join(["platform", "kernels"]),
        "PYTHONUNBUFFERED": "1",
        "FEATURES_OUT": str(out / "features.json"),
        "FEATURES_COMMIT": commit,
    }
    with (out / f"{job.name}.log").open("w") as log:
        process = subprocess.Popen(
            [python, *job.arguments, *written],
            cwd=ROOT, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        while process.poll() is None and not over.wait(0.2):
            pass
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # an engine has processes of its own, which hold the GPU's memory
            process.wait()
            return "out of time"
    return f"exit {process.returncode}" if process.returncode else "green"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="+", metavar="GROUP", choices=GROUPS)
    parser.add_argument("--out", type=lambda text: Path(text).resolve(), required=True)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--gpus", default="0")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--python", default=sys.executable)
    options = parser.parse_args(arguments)
    jobs = [job for group in options.groups for job in GROUPS[group]()]
    over = threading.Event()
    clock = threading.Timer(options.seconds, over.set)
    clock.start()
    ends = run(jobs, options.gpus.split(","), options.out, options.commit, options.python, over)
    clock.cancel()
    print("\n".join(f"{name:32} {how}" for name, how in ends.items()))
    for record in json.loads((options.out / "records.json").read_text()):
        if record["suite"] == "engine":
            name = (record["workload"], record["model"], record["variant"], record["system"])
            print(*name, record["value"], f"({record['min']} to {record['max']})", record["unit"])
    return int(any(how != "green" for how in ends.values()))


if __name__ == "__main__":
    sys.exit(main())
