"""W1-W4 on vLLM or SGLang, random weights at the public Llama 3.2 shapes: the requests of workloads.py, in the same call on the same card.

usage: python benchmarks/engine/peers.py vllm|sglang MODEL [--variant bf16|kv-fp8|kv-int8|w8a8-fp8] [--only W1,W2-B64,…] [--out FILE] [--commit HASH]
       [--seconds S]; prints one JSON record per line and keeps them in FILE. Needs the peer's package and none of ours.

Offline engines without HTTP and detokenisation, prefix cache off, their defaults otherwise. Before the workloads comes
`first-start`: seconds from the start of this process to the first token of a prompt of 128, with whatever caches of compiled kernels
the machine had, and without weights to read (cold_start.py reads them, and says what the caches held).
W2-B256-2048, on request: decode steps at a mean context of 2 032, which is where workloads.py takes them without a loop.
"""

import argparse
import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
import traceback
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # processes that SGLang spawns import this file without its folder

import definitions  # noqa: E402
from definitions import SHAPES, Records, Workloads, model_directory, process_seconds  # noqa: E402

# kernels.py in this folder would pass for the package of that name, which transformers looks for.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != HERE]

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # FlashInfer's sampler is for top-k and top-p, which no workload asks for; the rest of the package need not be there.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
WORKLOADS: dict[str, Callable[[Workloads], None]] = {
    **definitions.WORKLOADS,
    "W2-B256-2048": lambda bench: bench.decode("W2-B256-2048", 256, 1904, 256),
}
MEMORY = 0.85  # of the card: both peers reserve their cache at the start


class Peer(Workloads):
    """A peer's offline engine; `records` is set once it has started.

    `load_format`: "auto" for a checkpoint, "dummy" for a folder with a config alone; `variant`: one of `settings`.
    """

    records: Records
    program: str
    settings: ClassVar[dict[str, dict[str, str]]]  # of the engine, by our name of the variant

    def __init__(self, model: Path, load_format: str, max_model_len: int, variant: str = "bf16") -> None:
        super().__init__()
        self.variant = variant
        self.start(model, load_format, max_model_len)

    def record(self, workload: str, values: list[float], unit: str, higher: bool) -> None:
        self.records.add(workload, self.variant, values, unit, higher, f"{self.program} --only {workload}")

    def seconds(self, prompts: list[list[int]], lengths: list[int], temperature: float = 0.0) -> float:
        started = time.perf_counter()
        found = self.generate(prompts, lengths, temperature)
        elapsed = time.perf_counter() - started
        if found != lengths:
            raise RuntimeError(f"answers of {sum(found)} tokens, and {sum(lengths)} were asked for")
        return elapsed

    @abstractmethod
    def start(self, model: Path, load_format: str, max_model_len: int) -> None:
        """Import the package and make the engine."""

    @abstractmethod
    def generate(self, prompts: list[list[int]], lengths: list[int], temperature: float) -> list[int]:
        """Send all at once, wait, and give the number of tokens of each answer."""

    def close(self) -> None:
        """End the processes of the engine."""


class Vllm(Peer):
    """vLLM's `LLM`."""

    settings: ClassVar = {
        "bf16": {},
        "kv-fp8": {"kv_cache_dtype": "fp8"},
        "kv-int8": {"kv_cache_dtype": "int8_per_token_head"},
        "w8a8-fp8": {"quantization": "fp8"},
    }

    def start(self, model: Path, load_format: str, max_model_len: int) -> None:
        from vllm import LLM, SamplingParams

        self._params = SamplingParams
        self._llm = LLM(
            model=str(model), load_format=load_format, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=max_model_len,
            gpu_memory_utilization=MEMORY, enable_prefix_caching=False, disable_log_stats=True, seed=0, **self.settings[self.variant],
        )  # fmt: skip

    def generate(self, prompts: list[list[int]], lengths: list[int], temperature: float) -> list[int]:
        params = [self._params(max_tokens=n, ignore_eos=True, temperature=temperature, detokenize=False) for n in lengths]
        answers = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [len(answer.outputs[0].token_ids) for answer in answers]


class Sglang(Peer):
    """SGLang's `Engine`."""

    settings: ClassVar = {"bf16": {}, "kv-fp8": {"kv_cache_dtype": "fp8_e4m3"}, "w8a8-fp8": {"quantization": "fp8"}}

    def start(self, model: Path, load_format: str, max_model_len: int) -> None:
        import sglang  # type: ignore[import-not-found]

        self._engine = sglang.Engine(
            model_path=str(model), load_format=load_format, skip_tokenizer_init=True, dtype="bfloat16", context_length=max_model_len,
            mem_fraction_static=MEMORY, disable_radix_cache=True, random_seed=0, log_level="error", **self.settings[self.variant],
        )  # fmt: skip

    def generate(self, prompts: list[list[int]], lengths: list[int], temperature: float) -> list[int]:
        params = [{"max_new_tokens": n, "ignore_eos": True, "temperature": temperature} for n in lengths]
        answers: list[dict[str, Any]] = self._engine.generate(input_ids=prompts, sampling_params=params)
        return [answer["meta_info"]["completion_tokens"] for answer in answers]

    def close(self) -> None:
        self._engine.shutdown()


PEERS: dict[str, type[Vllm] | type[Sglang]] = {"vllm": Vllm, "sglang": Sglang}


def versions(system: str) -> dict[str, str]:
    """Of the interpreter, and of torch, Triton and the peer where their metadata is there: nothing is imported."""
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", system):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def hardware() -> str:
    """The card's name, without a CUDA context in this process where its driver's tool is there."""
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        import torch

        return torch.cuda.get_device_name()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=sorted(PEERS))
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("--variant", default="bf16", choices=Vllm.settings)
    parser.add_argument("--only", default=",".join(definitions.WORKLOADS), help="workloads, in this order")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--seconds", type=float, default=420, help="no workload starts later than this after the process")
    options = parser.parse_args()
    names = [name for name in options.only.split(",") if name]
    unknown = [name for name in names if name not in WORKLOADS]
    if unknown:
        parser.error(f"no workload {', '.join(unknown)}: use some of {', '.join(WORKLOADS)}")
    if options.variant not in PEERS[options.system].settings:
        parser.error(f"{options.system} has no {options.variant}: use one of {', '.join(PEERS[options.system].settings)}")
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)

    peer = PEERS[options.system](model_directory(options.model), "dummy", 4096, options.variant)
    peer.program = f"python benchmarks/engine/peers.py {options.system} {options.model} --variant {options.variant}"
    peer.seconds([peer.ids(128)], [1])
    started = process_seconds()
    peer.records = Records(options.model, options.system, options.commit, hardware(), versions(options.system), options.out)
    peer.records.add("first-start", options.variant, [started], "s", False, peer.program)
    failed = []
    for name in names:
        if process_seconds() > options.seconds:
            print(f"{name}: left out, {options.seconds:g} s are over", file=sys.stderr, flush=True)
            failed.append(name)
            continue
        try:
            WORKLOADS[name](peer)
        except Exception:
            print(f"{name} failed:", file=sys.stderr)
            traceback.print_exc()
            failed.append(name)
    peer.close()
    sys.exit(f"without a result: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
