"""What the front end costs: the endpoint against the bare engine, against bare uvicorn, and what it can stream at all.

    python benchmarks/serving/overhead.py [--write] [--pin]

On a CPU with cria, 64 streams at once, what is compared interleaved in one run; about three minutes on two cores. `--write` replaces
benchmarks/results/serving.json. `--pin` keeps engines on the first core and all else on the others, for a look at a machine that is
busy with other work.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
from bare_engine import BareEngine
from front_end import AS_RAY, FAKE_STEP_S, SETTINGS, STREAMS
from results import RESULTS, Series, records, shown

from altiplano import spec
from altiplano.cluster import local_ray
from altiplano.cluster.processes import free_port, marked
from altiplano.serve import ServeControl
from altiplano.serve.application import START_TIMEOUT_S, serve_config

HERE = Path(__file__).parent
REPETITIONS = 7
PROMPT = list(range(10, 42))
ANSWER = 128  # tokens of the real engine's answers
PACED_ANSWER, PACED_STEP_S = 100, 0.02
FAST_ANSWER = 1500

Run = Callable[[], float]


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--write", action="store_true")
    options.add_argument("--pin", action="store_true")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder, ray_head(Path(folder)) as control:
        series = first_tokens(control, Path(folder), args.pin) + throughput(control, Path(folder), args.pin)
    found = records(series, pinned=args.pin)
    print(shown(found))
    if args.write:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def first_tokens(control: ServeControl, workspace: Path, pinned: bool) -> list[Series]:
    """A fake engine with a token every 20 ms: what passes between a request and its first chunk, and how much can pass at all."""
    with ExitStack() as stack:
        bare = stack.enter_context(front_end("bare", PACED_STEP_S))
        paced = stack.enter_context(front_end("endpoint", PACED_STEP_S))
        fast = stack.enter_context(front_end("endpoint", 0.0))
        serve = stack.enter_context(ray_serve(control, PACED_STEP_S))
        if pinned:
            pin(workspace)
        values = interleaved(
            {
                "bare": lambda: ttft(bare, PACED_ANSWER),
                "uvicorn": lambda: ttft(paced, PACED_ANSWER),
                "ray serve": lambda: ttft(serve, PACED_ANSWER),
                "fast": lambda: tokens_per_s(fast, FAST_ANSWER),
            }
        )
    compared = {name: values[name] for name in ("bare", "uvicorn", "ray serve")}
    return [
        Series("ttft p50", "fake engine", "ms", compared, higher_is_better=False),
        Series("ttft p50", "fake engine", "times bare", ratios(compared), higher_is_better=False),
        Series("streamed", "fake engine", "output tok/s", {"uvicorn": values["fast"]}, higher_is_better=True),
    ]


def throughput(control: ServeControl, workspace: Path, pinned: bool) -> list[Series]:
    """The real engine, with and without a front end."""
    with ExitStack() as stack:
        engine = BareEngine(SETTINGS)
        stack.callback(engine.close)
        near = stack.enter_context(front_end("endpoint", None))
        serve = stack.enter_context(ray_serve(control, None))
        if pinned:
            pin(workspace)

        def bare() -> float:
            done = engine.run(PROMPT, ANSWER, STREAMS)
            return float(done["tokens"] / done["seconds"])

        values = interleaved(
            {
                "bare": bare,
                "uvicorn": lambda: tokens_per_s(near, ANSWER),
                "ray serve": lambda: tokens_per_s(serve, ANSWER),
            }
        )
    return [
        Series("output", "float32", "output tok/s", values, higher_is_better=True),
        Series("output", "float32", "of bare", ratios(values), higher_is_better=True),
    ]


def interleaved(runs: dict[str, Run]) -> dict[str, list[float]]:
    """Each once to warm up, then all of them in turn, every second time backwards."""
    values: dict[str, list[float]] = defaultdict(list)
    for run in runs.values():
        run()
    for repetition in range(REPETITIONS):
        for name in list(runs) if repetition % 2 else reversed(list(runs)):
            values[name].append(runs[name]())
    return values


def ratios(values: dict[str, list[float]]) -> dict[str, list[float]]:
    """What stands beside `bare`, divided by what `bare` had in the same repetition."""
    return {
        name: [mine / bare for mine, bare in zip(found, values["bare"], strict=True)]
        for name, found in values.items()
        if name != "bare"
    }


def ttft(port: int, max_tokens: int) -> float:
    """Median milliseconds from a request to its first chunk."""
    return float(statistics.median(load(port, max_tokens)["ttft_s"])) * 1e3


def tokens_per_s(port: int, max_tokens: int) -> float:
    """Streamed tokens, as the server's `usage` has them, over the wall time of all streams."""
    done = load(port, max_tokens)
    if done["tokens"] != STREAMS * max_tokens:
        raise RuntimeError(f"{done['tokens']} of {STREAMS * max_tokens} tokens came")
    return float(done["tokens"] / done["seconds"])


def load(port: int, max_tokens: int) -> dict[str, Any]:
    """What load.py measures, in a process of its own."""
    body = {"model": "cria", "prompt": PROMPT, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    asked = json.dumps({"port": port, "path": "/v1/completions", "body": body, "streams": STREAMS})
    done = subprocess.run([sys.executable, str(HERE / "load.py")], input=asked, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


@contextmanager
def front_end(kind: str, step_s: float | None) -> Iterator[int]:
    """The port of a front end under uvicorn in a process of its own."""
    pace = [] if step_s is None else ["--step-s", str(step_s)]
    command = [*AS_RAY, sys.executable, str(HERE / "front_end.py"), kind, *pace]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        yield int(process.stdout.readline())
        process.stdin.close()
        process.wait()


@contextmanager
def ray_head(workspace: Path) -> Iterator[ServeControl]:
    """A Ray of our own."""
    try:
        head = local_ray.start(workspace, 4)
        yield ServeControl(head.dashboard, local_ray.token(workspace))
    finally:
        local_ray.stop(workspace)


@contextmanager
def ray_serve(control: ServeControl, step_s: float | None) -> Iterator[int]:
    """The port of the endpoint on Ray Serve behind HAProxy: one replica, with the fake engine where a step's length is given."""
    endpoint = spec.Serve(port=free_port(), max_num_seqs=STREAMS)
    config = serve_config(SETTINGS, endpoint)
    (application,) = config["applications"]
    if step_s is not None:
        application["import_path"] = "fake_endpoint:build"
        application["runtime_env"]["env_vars"] |= {"PYTHONPATH": str(HERE), FAKE_STEP_S: str(step_s)}
    control.deploy(config, START_TIMEOUT_S)
    deadline = time.monotonic() + 60
    # HAProxy learns of replicas a moment after Serve calls them running.
    while not httpx.get(f"http://127.0.0.1:{endpoint.port}/health").is_success:
        if time.monotonic() > deadline:
            raise RuntimeError("the endpoint on Ray Serve does not answer")
        time.sleep(0.1)
    yield endpoint.port
    control.undeploy()


def pin(workspace: Path) -> None:
    """Engines on the first core, everything else of ours on the others."""
    others = set(range(1, psutil.cpu_count() or 1))
    for process in [psutil.Process(), *psutil.Process().children(recursive=True), *marked(workspace)]:
        cores = {0} if any("engine" in part for part in process.cmdline()[1:3]) else others
        for thread in process.threads():
            os.sched_setaffinity(thread.id, cores)


if __name__ == "__main__":
    main()
