"""W1-W4 as requests and figures, the same for our engine and its peers. Knows neither torch nor an engine.

W1, W2: (time of 1 + n tokens less time of 1 token) / n steps. W3: output tokens over wall time of all requests, lengths in and out
uniform in 100 … 1024, temperature 0.6. W4: prompt tokens over wall time of one token each. The rest is greedy. Token ids are
random, with the workload's name as the seed, so that every system gets the same prompts.
"""

import datetime
import json
import os
import random
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
RUNS = 3
_IMPORTED = time.perf_counter()


def model_config(model: str) -> dict[str, object]:
    """config.json of the public shape: "1b" or "3b"."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 500000.0, "rope_scaling": ROPE, "intermediate_size": 8192,
        "hidden_act": "silu", "bos_token_id": 128000, "eos_token_id": 128001, "torch_dtype": "bfloat16", **SHAPES[model],
    }  # fmt: skip


def model_directory(model: str) -> Path:
    """A folder with the config alone: the weights are random."""
    where = Path(tempfile.mkdtemp())
    (where / "config.json").write_text(json.dumps(model_config(model)))
    return where


@dataclass
class Records:
    """Results of one program on one system; each is printed, and the file rewritten, as soon as it is there."""

    model: str
    system: str
    commit: str
    hardware: str
    versions: Mapping[str, str]
    out: Path | None = None
    rows: list[dict[str, object]] = field(default_factory=list)

    def add(self, workload: str, variant: str, values: Sequence[float], unit: str, higher_is_better: bool, command: str) -> None:
        """The median of `values`, one per run, with their range."""
        row: dict[str, object] = {
            "suite": "engine", "workload": workload, "model": self.model, "variant": variant, "system": self.system,
            "value": _rounded(statistics.median(values)), "unit": unit, "higher_is_better": higher_is_better, "runs": len(values),
            "min": _rounded(min(values)), "max": _rounded(max(values)), "command": command, "commit": self.commit,
            "hardware": self.hardware, "versions": dict(self.versions),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        }  # fmt: skip
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        if self.out is not None:
            self.out.write_text(json.dumps(self.rows, indent=1) + "\n")


class Workloads(ABC):
    """The requests of W1-W4, sent through one system's `seconds`; each figure goes to `record`."""

    def __init__(self) -> None:
        self._dice = random.Random(0)

    @abstractmethod
    def seconds(self, prompts: list[list[int]], lengths: list[int], temperature: float = 0.0) -> float:
        """Wall time until all prompts have their answers, of exactly `lengths` tokens."""

    @abstractmethod
    def record(self, workload: str, values: list[float], unit: str, higher: bool) -> None:
        """Keep one figure per run."""

    def warm_up(self, requests: int) -> None:  # noqa: B027 (a peer does so at its start)
        """Build what `requests` at once need, before the clock runs."""

    def ids(self, n: int) -> list[int]:
        return [self._dice.randint(0, 127999) for _ in range(n)]

    def decode(self, name: str, batch: int, inputs: int, outputs: int) -> None:
        self._dice = random.Random(name)

        def run(n: int) -> float:
            return self.seconds([self.ids(inputs) for _ in range(batch)], [n] * batch)

        run(outputs // 4)
        first = min(run(1) for _ in range(RUNS))
        self.record(name, [(run(outputs + 1) - first) / outputs * 1e3 for _ in range(RUNS)], "ms/step", False)

    def mixed(self, name: str, requests: int) -> None:
        self._dice = random.Random(name)
        prompts = [self.ids(self._dice.randint(100, 1024)) for _ in range(requests)]
        lengths = [self._dice.randint(100, 1024) for _ in range(requests)]
        self.warm_up(requests)
        self.record(name, [sum(lengths) / self.seconds(prompts, lengths, 0.6) for _ in range(RUNS)], "output tok/s", True)

    def prefill(self, name: str) -> None:
        self._dice = random.Random(name)

        def run() -> float:
            return self.seconds([self.ids(1024) for _ in range(128)], [1] * 128)

        run()
        self.record(name, [128 * 1024 / run() for _ in range(RUNS)], "tok/s", True)


WORKLOADS: dict[str, Callable[[Workloads], None]] = {
    "W1": lambda bench: bench.decode("W1", 1, 128, 512),
    "W2-B8": lambda bench: bench.decode("W2-B8", 8, 512, 256),
    "W2-B64": lambda bench: bench.decode("W2-B64", 64, 512, 256),
    "W2-B256": lambda bench: bench.decode("W2-B256", 256, 512, 256),
    "W4": lambda bench: bench.prefill("W4"),
    "W3-256": lambda bench: bench.mixed("W3-256", 256),
    "W3-1024": lambda bench: bench.mixed("W3-1024", 1024),
}


def process_seconds() -> float:
    """Seconds since this process was started, the interpreter's own start and all imports included.

    Where a sandbox's answer cannot be true, seconds since this module was imported.
    """
    here = time.perf_counter() - _IMPORTED
    try:
        # Field 22 counts clock ticks since the machine's start; the second field, the program's name, may hold blanks.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return here
    return age if here - 0.1 <= age <= here + 60 else here


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
