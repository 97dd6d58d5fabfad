"""The engine's CPU backend on cria: steps and tokens per second, and the host's share of a step.

    python benchmarks/control_plane.py [--write]

Prints a table; `--write` replaces benchmarks/results/control_plane.json.
"""

import argparse
import json
import platform
import random
import statistics
import subprocess
import time
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch

from altiplano.engine import Engine, EngineConfig, SamplingParams
from altiplano.models.cria import cria_path

RUNS, PROMPT, ANSWER = 5, 128, 64
RESULTS = Path(__file__).parent / "results/control_plane.json"


def measure(batch: int) -> tuple[float, float]:
    """(milliseconds per decode step, share of it spent outside the model) for `batch` greedy answers."""
    rng = random.Random(0)
    prompts = [[rng.randrange(8, 2000) for _ in range(PROMPT)] for _ in range(batch)]
    engine = Engine(
        EngineConfig(
            cria_path(), num_blocks=batch * 8, max_model_len=256, max_num_seqs=batch, max_num_batched_tokens=batch * PROMPT
        )
    )
    params = SamplingParams(max_tokens=ANSWER, temperature=0.0, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, params)
    engine.step()  # prompts
    before, started = engine.stats(), time.perf_counter()
    while engine.has_unfinished():
        engine.step()
    whole = time.perf_counter() - started
    after = engine.stats()
    steps, model = after.steps - before.steps, after.step_seconds - before.step_seconds
    return whole / steps * 1e3, (whole - model) / whole


def record(workload: str, values: list[float], unit: str) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    return {
        "suite": "control_plane",
        "workload": workload,
        "model": "cria",
        "variant": "float32",
        "system": "altiplano",
        "value": round(statistics.median(values), 3),
        "unit": unit,
        "higher_is_better": False,
        "runs": len(values),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
        "command": "python benchmarks/control_plane.py --write",
        "commit": commit,
        "hardware": f"{psutil.cpu_count()} cores of {platform.processor() or platform.machine()}, one thread",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "date": date.today().isoformat(),
    }


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--write", action="store_true")
    args = options.parse_args()
    torch.set_num_threads(1)
    records = []
    for batch in (1, 8, 64):
        measure(batch)  # warm up
        runs = [measure(batch) for _ in range(RUNS)]
        records.append(record(f"decode-B{batch}", [ms for ms, _ in runs], "ms/step"))
        records.append(record(f"host-share-B{batch}", [share for _, share in runs], "share of a step"))
    for r in records:
        print(f"{r['workload']:<16}{r['value']:>9} {r['unit']:<16} ({r['min']} to {r['max']}, {r['runs']} runs)")
    if args.write:
        RESULTS.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
