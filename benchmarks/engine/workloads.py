"""W1-W4 on our engine, random weights at the public Llama 3.2 shapes: what the programs for vLLM and SGLang measure, the same way.

usage: PYTHONPATH=platform:kernels python benchmarks/engine/workloads.py MODEL [--variant bf16|kv-fp8|kv-int8|w-int8|w-int4] [--only W1,W2-B64,…]
       [--out FILE] [--commit HASH]; prints one JSON record per line and writes them to FILE.

W1, W2: (time of 1 + n tokens less time of 1 token) / n steps, through the engine's own loop. W3: output tokens over wall time of all
requests. W4: prompt tokens over wall time of one token each. W2-B256-2048: decode steps at context 2 048, without the loop.
"""

import argparse
import datetime
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from altiplano.engine import EngineConfig, SamplingParams
from altiplano.engine.cuda.overlap import OverlappedEngine
from altiplano.engine.cuda.runner import CudaRunner

SHAPES = {
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
    "3b": {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128},
}
ROPE = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
BLOCKS = {"1b": 70_000, "3b": 35_000}
RUNS = 3


def model_directory(model: str) -> Path:
    """A config.json of the public shape; the weights are random."""
    where = Path(tempfile.mkdtemp())
    config = {
        "model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "rope_theta": 500000.0, "rope_scaling": ROPE, "intermediate_size": 8192, "eos_token_id": 128001, **SHAPES[model],
    }  # fmt: skip
    (where / "config.json").write_text(json.dumps(config))
    return where


class Bench:
    """One engine and the records made on it."""

    def __init__(self, model: str, variant: str, commit: str) -> None:
        self.model, self.variant, self.commit = model, variant, commit
        self.records: list[dict[str, object]] = []
        config = EngineConfig(
            model=model_directory(model), dtype="bfloat16", device="cuda", load_format="dummy", max_model_len=2112, max_num_seqs=1024,
            max_num_batched_tokens=16384, num_blocks=BLOCKS[model], enable_prefix_caching=False,
        )  # fmt: skip
        kind, _, name = variant.partition("-")
        self.runner = CudaRunner(
            config, kv_cache_dtype=name if kind == "kv" else "auto", quantization=name if kind == "w" else "none"
        )
        self.engine = OverlappedEngine(config, self.runner)
        self._dice = random.Random(0)

    def ids(self, n: int) -> list[int]:
        return [self._dice.randint(0, 127999) for _ in range(n)]

    def seconds(self, prompts: list[list[int]], lengths: list[int], temperature: float = 0.0) -> float:
        params = [SamplingParams(max_tokens=n, ignore_eos=True, temperature=temperature) for n in lengths]
        torch.cuda.synchronize()
        started = time.perf_counter()
        answers = self.engine.generate(prompts, params)
        elapsed = time.perf_counter() - started
        assert [len(answer.token_ids) for answer in answers] == lengths
        return elapsed

    def decode(self, name: str, batch: int, inputs: int, outputs: int) -> None:
        def run(n: int) -> float:
            return self.seconds([self.ids(inputs) for _ in range(batch)], [n] * batch)

        run(outputs // 4)
        first = min(run(1) for _ in range(RUNS))
        values = [(run(outputs + 1) - first) / outputs * 1e3 for _ in range(RUNS)]
        self.record(name, values, "ms/step", False)

    def mixed(self, name: str, requests: int) -> None:
        prompts = [self.ids(self._dice.randint(100, 1024)) for _ in range(requests)]
        lengths = [self._dice.randint(100, 1024) for _ in range(requests)]
        self.runner.warm_up(range(1, min(requests, 1024) + 1))
        self.record(name, [sum(lengths) / self.seconds(prompts, lengths, 0.6) for _ in range(RUNS)], "output tok/s", True)

    def prefill(self, name: str) -> None:
        def run() -> float:
            return self.seconds([self.ids(1024) for _ in range(128)], [1] * 128)

        run()
        self.record(name, [128 * 1024 / run() for _ in range(RUNS)], "tok/s", True)

    def steps(self, name: str, batch: int, context: int) -> None:
        """Steps at one context length over a cache of random keys and values: the graphs alone, without prompts and engine loop."""
        runner, per, count = self.runner, -(-context // 32) + 2, 32
        used = slice(0, batch * per)
        for layer in runner.model.cache:
            values = torch.randn(layer[used].shape, dtype=torch.bfloat16, device=layer.device)
            layer[used].copy_(values * (50 if layer.dtype == torch.int8 else 1))
        if runner.model.scales is not None:
            runner.model.scales.fill_(0.01)
        slots = list(range(batch))
        for slot in slots:
            runner.slots.set_pages(slot, range(slot * per, (slot + 1) * per), fresh=True)

        def run() -> float:
            runner.slots.write(slots, [1] * batch, [context - count] * batch, [0] * batch, [0.0] * batch, [0] * batch)
            runner.launch_decode(slots, 1)
            torch.cuda.synchronize()
            started = time.perf_counter()
            runner.launch_decode(slots, count)
            torch.cuda.synchronize()
            return (time.perf_counter() - started) / count * 1e3

        run()
        self.record(name, [run() for _ in range(RUNS)], "ms/step", False)

    def record(self, workload: str, values: list[float], unit: str, higher: bool) -> None:
        record: dict[str, object] = {
            "suite": "engine", "workload": workload, "model": self.model, "variant": self.variant, "system": "altiplano",
            "value": float(f"{statistics.median(values):.5g}"), "unit": unit, "higher_is_better": higher, "runs": len(values),
            "min": float(f"{min(values):.5g}"), "max": float(f"{max(values):.5g}"),
            "command": f"python benchmarks/engine/workloads.py {self.model} --variant {self.variant} --only {workload}",
            "commit": self.commit, "hardware": torch.cuda.get_device_name(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        }  # fmt: skip
        self.records.append(record)
        print(json.dumps(record), flush=True)


WORKLOADS: dict[str, Callable[[Bench], None]] = {
    "W1": lambda bench: bench.decode("W1", 1, 128, 512),
    "W2-B8": lambda bench: bench.decode("W2-B8", 8, 512, 256),
    "W2-B64": lambda bench: bench.decode("W2-B64", 64, 512, 256),
    "W2-B256": lambda bench: bench.decode("W2-B256", 256, 512, 256),
    "W2-B256-2048": lambda bench: bench.steps("W2-B256-2048", 256, 2048),
    "W4": lambda bench: bench.prefill("W4"),
    "W3-256": lambda bench: bench.mixed("W3-256", 256),
    "W3-1024": lambda bench: bench.mixed("W3-1024", 1024),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("--variant", default="bf16", choices=["bf16", "kv-fp8", "kv-int8", "w-int8", "w-int4"])
    parser.add_argument("--only", default=",".join(WORKLOADS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    started = time.perf_counter()
    bench = Bench(options.model, options.variant, options.commit)
    bench.seconds([bench.ids(128)], [1])
    print(f"start to first token: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    for name in options.only.split(","):
        WORKLOADS[name](bench)
        if options.out:
            options.out.write_text(json.dumps(bench.records, indent=1) + "\n")


if __name__ == "__main__":
    main()
