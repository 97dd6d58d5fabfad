"""Seconds from the start of a process to its first token, on a checkpoint whose files are in the page cache.

usage: PYTHONPATH=platform:kernels python benchmarks/engine/cold_start.py MODEL [--system altiplano|vllm|sglang] [--checkpoint FOLDER]
       [--empty-runs 1] [--runs 3] [--out FILE] [--commit HASH] [--timeout S]; prints one JSON record per line and keeps them in FILE.

A checkpoint of random weights is made (or taken from FOLDER) and read once. Then come fresh processes that load it with a context of
8 192 and answer one prompt of 128 tokens: `cold-start` with empty caches of compiled kernels, `start` with what one start has left in
them. `…-answer` is until the 16th token, when graphs and kernels of decode steps are there too; `…/imports` and so on are the parts of
the time to the first token. Python's bytecode is compiled and all packages are read before the first process is timed.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # as in peers.py, which also takes it out again

from definitions import SHAPES, Records  # noqa: E402
from peers import ENVIRONMENT, PEERS, hardware, versions  # noqa: E402

CONTEXT, PROMPT, ANSWER = 8192, 128, 16
BLOCKS = {"1b": 60_000, "3b": 30_000}
MARK = "STAGES "


class Stages:
    """Seconds since the parent started this process, at the end of each part of the start."""

    def __init__(self, began: float) -> None:
        self._began = self._last = began
        self.parts: dict[str, float] = {}

    def end(self, part: str) -> None:
        now = time.time()
        self.parts[part] = now - self._last
        self._last = now

    def total(self) -> float:
        return self._last - self._began


def child(system: str, model: str, checkpoint: Path, began: float) -> None:
    """Start, answer, and print what took how long."""
    stages = Stages(began)
    prompt = [random.Random("start").randint(0, 127999) for _ in range(PROMPT)]
    (_altiplano if system == "altiplano" else _peer)(system, model, checkpoint, prompt, stages)


def _altiplano(_: str, model: str, checkpoint: Path, prompt: list[int], stages: Stages) -> None:
    import torch

    from altiplano.engine import EngineConfig, SamplingParams, weights
    from altiplano.engine.backends import create_engine
    from altiplano.engine.config import LlamaConfig

    load = weights.load_weights

    def timed(directory: Path, config: LlamaConfig, dtype: torch.dtype, device: str) -> weights.Weights:
        found = load(directory, config, dtype, device)
        torch.cuda.synchronize()
        stages.end("weights")
        return found

    # Before the backend is imported, which takes the function by its name.
    weights.load_weights = timed
    import altiplano.engine.cuda.overlap  # noqa: F401

    stages.end("imports")
    torch.ones(1, device="cuda").item()
    stages.end("context")
    config = EngineConfig(
        model=checkpoint, dtype="bfloat16", device="cuda", max_model_len=CONTEXT, max_num_seqs=1024, max_num_batched_tokens=16384,
        num_blocks=BLOCKS[model], enable_prefix_caching=False,
    )  # fmt: skip
    engine = create_engine(config)
    torch.cuda.synchronize()
    stages.end("cache")
    for count in (1, ANSWER):
        answer = engine.generate([prompt], SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True))[0]
        assert len(answer.token_ids) == count
        _tell(stages, "first step" if count == 1 else "answer")


def _peer(system: str, _: str, checkpoint: Path, prompt: list[int], stages: Stages) -> None:
    __import__(system)
    stages.end("imports")
    engine = PEERS[system](checkpoint, "auto", CONTEXT)
    stages.end("engine")
    for count in (1, ANSWER):
        engine.seconds([prompt], [count])
        _tell(stages, "first step" if count == 1 else "answer")
    engine.close()


def _tell(stages: Stages, part: str) -> None:
    stages.end(part)
    print(MARK + json.dumps({"total": stages.total(), "parts": stages.parts}), flush=True)


def environment(caches: Path) -> dict[str, str]:
    """Of a child that finds and leaves what it compiles under `caches`, and nowhere else."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    folders = {
        "HOME": "home", "XDG_CACHE_HOME": "home/.cache", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "CUDA_CACHE_PATH": "cuda", "VLLM_CACHE_ROOT": "vllm", "FLASHINFER_WORKSPACE_BASE": "home", "TVM_FFI_CACHE_DIR": "tvm",
    }  # fmt: skip
    # Packages that were installed for the user must be found although the home is another.
    return (
        kept | ENVIRONMENT | {"PYTHONUSERBASE": site.getuserbase()} | {key: str(caches / name) for key, name in folders.items()}
    )


def start(system: str, model: str, checkpoint: Path, caches: Path, timeout: float) -> tuple[float, float, Mapping[str, float]]:
    """Run one child: seconds to the first token, to the 16th, and the parts of the first.

    Raises:
        RuntimeError: it failed or took longer than `timeout` seconds; the message has the end of what it printed.
    """
    command = [sys.executable, __file__, model, "--system", system, "--checkpoint", str(checkpoint), "--began"]
    (caches / "home").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile("w+") as output:
        began = time.time()
        process = subprocess.Popen(
            [*command, repr(began)], stdout=output, stderr=subprocess.STDOUT, env=environment(caches), start_new_session=True
        )
        try:
            code: int | str = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = f"none after {timeout:g} s"
        # The peers' engines are processes of their own; the next start needs the memory that they hold.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        _wait_for_memory()
        output.seek(0)
        lines = output.read().splitlines()
    told = [json.loads(line.partition(MARK)[2]) for line in lines if MARK in line]
    if len(told) != 2:
        raise RuntimeError(f"exit code {code}:\n" + "\n".join(lines[-25:]))
    return told[0]["total"], told[1]["total"], told[0]["parts"]


def measure(records: Records, checkpoint: Path, empty_runs: int, runs: int, timeout: float, command: str) -> None:
    """Starts with empty caches, each with its own, then with those that the last of them has filled."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        _read(checkpoint)
        # What is imported is compiled to bytecode and in the page cache from here on.
        imported = "altiplano.engine.cuda.overlap" if records.system == "altiplano" else records.system
        subprocess.run([sys.executable, "-c", f"import {imported}"], env=environment(Path(scratch, "first")), check=False)
        caches = Path(scratch, "0")
        for workload, count in (("cold-start", empty_runs), ("start", runs)):
            found = []
            for turn in range(count):
                if workload == "cold-start":
                    caches = Path(scratch, str(turn))
                try:
                    found.append(start(records.system, records.model, checkpoint, caches, timeout))
                    print(f"{workload} {turn + 1}: {found[-1]}", file=sys.stderr, flush=True)
                except RuntimeError as error:
                    print(f"{workload} {turn + 1} failed: {error}", file=sys.stderr, flush=True)
            if found:
                firsts, answers, parts = zip(*found, strict=True)
                records.add(workload, "bf16", firsts, "s", False, command)
                records.add(f"{workload}-answer", "bf16", answers, "s", False, command)
                for part in parts[0]:
                    records.add(f"{workload}/{part}", "bf16", [one[part] for one in parts], "s", False, command)


def _wait_for_memory() -> None:
    """Until the card's memory has been given back, but not for long."""
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        used = subprocess.run(asked, capture_output=True, text=True).stdout.split()
        if not used or not used[0].isdigit() or int(used[0]) < 2000:
            return
        time.sleep(0.2)


def _read(checkpoint: Path) -> None:
    for path in checkpoint.glob("*.safetensors"):
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 26):
                pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("--system", default="altiplano", choices=["altiplano", *sorted(PEERS)])
    parser.add_argument("--checkpoint", type=Path, help="made here if there is none; a temporary folder by default")
    parser.add_argument("--empty-runs", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--timeout", type=float, default=240, help="seconds of one start")
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.began is not None:
        return child(options.system, options.model, options.checkpoint, options.began)
    checkpoint = options.checkpoint or Path(tempfile.mkdtemp())
    try:
        if not (checkpoint / "config.json").exists():
            # In a process of its own, which gives the card's memory back.
            subprocess.run([sys.executable, str(HERE / "checkpoint.py"), options.model, str(checkpoint)], check=True)
        command = f"python benchmarks/engine/cold_start.py {options.model} --system {options.system}"
        known = versions(options.system)
        records = Records(options.model, options.system, options.commit, hardware(), known, options.out)
        measure(records, checkpoint, options.empty_runs, options.runs, options.timeout, command)
    finally:
        if options.checkpoint is None:
            shutil.rmtree(checkpoint, ignore_errors=True)


if __name__ == "__main__":
    main()
