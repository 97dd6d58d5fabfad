"""W1-W4 on our engine, random weights at the public Llama 3.2 shapes: what the programs for vLLM and SGLang measure, the same way.

usage: PYTHONPATH=platform:kernels python benchmarks/engine/workloads.py MODEL [--variant VARIANT] [--only W1,W2-B64,…] [--out FILE] [--commit HASH];
       VARIANT: bf16, kv-fp8, kv-int8, w-int8, w-int4, w8a8-fp8, w8a8-int8, deterministic, lora or lora-8; prints one JSON record per line and
       writes them to FILE.

What W1-W4 are says definitions.py. W2-B256-2048: decode steps at context 2 048, without the loop. lora: bf16, and all requests with one adapter of
rank 16 on every linear layer (for W1); lora-8: with eight adapters in turn (for W2-B8).
"""

import argparse
import gc
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import definitions
import torch
import triton
from checkpoint import write_adapter
from definitions import RUNS, SHAPES, Records, model_config, model_directory

from altiplano.engine import EngineConfig, SamplingParams
from altiplano.engine.cuda.overlap import OverlappedEngine
from altiplano.engine.cuda.runner import CudaRunner

VARIANTS = ("bf16", "kv-fp8", "kv-int8", "w-int8", "w-int4", "w8a8-fp8", "w8a8-int8", "deterministic", "lora", "lora-8")
RANK = 16  # of adapters
BLOCKS = {"1b": 70_000, "3b": 35_000}


class Bench(definitions.Workloads):
    """One engine and the records made on it."""

    def __init__(self, model: str, variant: str, commit: str, out: Path | None = None) -> None:
        super().__init__()
        versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
        self.records = Records(model, "altiplano", commit, torch.cuda.get_device_name(), versions, out)
        self.variant = variant
        config = EngineConfig(
            model=model_directory(model), dtype="bfloat16", device="cuda", load_format="dummy", max_model_len=2112, max_num_seqs=1024,
            max_num_batched_tokens=16384, num_blocks=BLOCKS[model], enable_prefix_caching=False, deterministic=variant == "deterministic",
        )  # fmt: skip
        kind, _, name = variant.partition("-")
        quantization = {"w": name, "w8a8": variant}.get(kind, "none")
        self.runner = CudaRunner(config, kv_cache_dtype=name if kind == "kv" else "auto", quantization=quantization)
        self.engine = OverlappedEngine(config, self.runner)
        self.adapters: list[str] = []
        if kind == "lora":
            self._load_adapters(int(name or 1))
        gc.collect()
        gc.freeze()  # as the engine's process does

    def seconds(self, prompts: list[list[int]], lengths: list[int], temperature: float = 0.0) -> float:
        params = [SamplingParams(max_tokens=n, ignore_eos=True, temperature=temperature) for n in lengths]
        torch.cuda.synchronize()
        started = time.perf_counter()
        found = self._generate(prompts, params)
        elapsed = time.perf_counter() - started
        assert found == lengths
        return elapsed

    def warm_up(self, requests: int) -> None:
        self.runner.warm_up(range(1, min(requests, 1024) + 1))

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

    def _load_adapters(self, count: int) -> None:
        for i in range(count):
            with tempfile.TemporaryDirectory() as where:
                write_adapter(model_config(self.records.model), Path(where), RANK, seed=i)
                self.engine.load_adapter(f"adapter-{i}", Path(where))
            self.adapters.append(f"adapter-{i}")

    def _generate(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[int]:
        """Tokens of each answer; where there are adapters, requests have them in turn."""
        if not self.adapters:
            return [len(answer.token_ids) for answer in self.engine.generate(prompts, params)]
        tokens = {str(i): 0 for i in range(len(prompts))}
        for i, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
            self.engine.add_request(str(i), prompt, one, adapter=self.adapters[i % len(self.adapters)])
        while self.engine.has_unfinished():
            for news in self.engine.step():
                tokens[news.request_id] += news.token_id is not None
        return list(tokens.values())

    def record(self, workload: str, values: list[float], unit: str, higher: bool) -> None:
        command = f"python benchmarks/engine/workloads.py {self.records.model} --variant {self.variant} --only {workload}"
        self.records.add(workload, self.variant, values, unit, higher, command)


WORKLOADS: dict[str, Callable[[Bench], None]] = {
    **definitions.WORKLOADS,
    "W2-B256-2048": lambda bench: bench.steps("W2-B256-2048", 256, 2048),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("--variant", default="bf16", choices=VARIANTS)
    parser.add_argument("--only", default=",".join(WORKLOADS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    started = time.perf_counter()
    bench = Bench(options.model, options.variant, options.commit, options.out)
    bench.seconds([bench.ids(128)], [1])
    print(f"start to first token: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    for name in options.only.split(","):
        WORKLOADS[name](bench)


if __name__ == "__main__":
    main()
