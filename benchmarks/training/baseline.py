"""Speed of a fine-tune through Ray Train at the public Llama 3.2 shapes: random weights, random tokens, every token supervised.

python benchmarks/training/baseline.py [--size 1b] [--variants lora qlora ddp2 …] [--steps N] [--out FILE] [--commit HASH]

A step is forward, backward and AdamW on 8 × 2 048 tokens a GPU, LoRA r = 16 on all linear layers. The first steps are left out
of the medians. `tiny` is a size for trying the program on a CPU.
"""

import argparse
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT / "kernels")]
os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")])

from altiplano import spec  # noqa: E402
from altiplano.data import EvalRow, Example, Prepared  # noqa: E402
from altiplano.data.audit import AuditReport  # noqa: E402

SHAPES = {
    "1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
    },
    "3b": {
        "hidden_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 8192,
    },
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
    },
}
# variant -> (workers, QLoRA, gradient checkpointing)
VARIANTS = {
    "bf16-lora": (1, False, False),
    "bf16-lora-gc": (1, False, True),
    "qlora": (1, True, False),
    "qlora-gc": (1, True, True),
    "bf16-lora-ddp2": (2, False, False),
    "qlora-ddp2": (2, True, False),
}
WARM_STEPS = 5


@dataclass(frozen=True)
class StepLog:
    """A sink that writes each step's loss, moment (s) and the peak memory of its process (bytes) to a file."""

    path: str

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        with Path(self.path).open("a") as stream:
            stream.write(json.dumps({**metrics, "step": step, "time": time.perf_counter(), "peak": peak}) + "\n")

    def set_tags(self, tags: Mapping[str, str]) -> None:
        pass


def main() -> None:
    options = arguments(__doc__, sorted(VARIANTS), ["bf16-lora", "qlora", "bf16-lora-ddp2"])
    import ray

    from altiplano.train import fit

    gpus = torch.cuda.device_count()
    os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"
    work = Path(tempfile.mkdtemp(prefix="altiplano-baseline-"))
    model = make_model(options.size, work / "model")
    ray.init(num_cpus=max(4, os.cpu_count() or 4), num_gpus=gpus, include_dashboard=False, log_to_driver=False)
    records: list[dict[str, Any]] = []
    for name in options.variants:
        workers, quantized, checkpointing = VARIANTS[name]
        log = work / f"{name}.jsonl"
        pipeline = make_pipeline(model, options, workers, quantized, checkpointing, use_gpu=gpus > 0)
        prepared = work / f"data-{workers}"
        if not prepared.exists():
            make_data(options, workers).save(prepared)
        started = time.perf_counter()
        result = fit(pipeline, prepared, work / "runs", sink=StepLog(str(log)), name=name)
        steps = [entry for line in log.read_text().splitlines() if "train/loss" in (entry := json.loads(line))]
        speeds = speeds_of([entry["time"] for entry in steps], options.rows * options.length * workers)
        records += records_of(options, name, "altiplano", speeds, steps[-1]["peak"], result.last_loss, len(steps), workers)
        print(
            f"{name:16s} {statistics.median(speeds):10,.0f} tok/s  {1e3 * options.rows * options.length * workers / statistics.median(speeds):8.1f} ms/step  "
            f"{steps[-1]['peak'] / 1e9:6.2f} GB  loss {steps[0]['train/loss']:.4f} -> {result.last_loss:.4f}  whole call {time.perf_counter() - started:.1f} s",
            flush=True,
        )
        if options.out:
            options.out.write_text(json.dumps(records, indent=1) + "\n")
    ray.shutdown()


def arguments(about: str | None, variants: list[str], default: list[str]) -> argparse.Namespace:
    """The command line of a program that measures some of `variants`, with `about` as its help."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--variants", nargs="+", choices=variants, default=default)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=8, help="sequences a GPU and step")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    if options.steps < WARM_STEPS + 2:
        parser.error(f"--steps {options.steps}: the first {WARM_STEPS} are left out, so give at least {WARM_STEPS + 2}")
    return options


def speeds_of(ends: list[float], tokens: int) -> list[float]:
    """Tokens a second of each step of `tokens` behind the first ones, from the moments (s) at which steps ended."""
    return [tokens / (after - before) for before, after in itertools.pairwise(ends[WARM_STEPS:])]


def random_rows(options: argparse.Namespace, count: int) -> list[list[int]]:
    """Token ids of `count` rows of exactly `length` tokens, the same in every program."""
    draw, words = random.Random(1), 1000 if options.size == "tiny" else 128_000
    return [[draw.randrange(4, words) for _ in range(options.length)] for _ in range(count)]


def make_model(size: str, directory: Path) -> Path:
    """A Llama of that shape with random bf16 weights (std 0.02) and a word-level tokenizer, in Hugging Face's format."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = 1000 if size == "tiny" else 128_256
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words, max_position_embeddings=131_072, rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
        **SHAPES[size],
    )  # fmt: skip
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        made = LlamaForCausalLM(config)
    made.to(torch.bfloat16).save_pretrained(directory)
    del made
    vocabulary = {"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, words)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=131_072,
    ).save_pretrained(directory)
    return directory


def make_data(options: argparse.Namespace, workers: int) -> Prepared:
    """Random rows of exactly `length` tokens, enough for all steps."""
    *train, held = [Example(ids, ids) for ids in random_rows(options, options.rows * workers * options.steps + 1)]
    report = AuditReport((), (), len(train), 1, len(train) * options.length, options.length, 1.0, {options.length: len(train)})
    return Prepared(
        train, [held], [EvalRow(1, [], held.input_ids[:1], "", held.input_ids, held.labels)], report, "random", "none"
    )


def make_pipeline(
    model: Path, options: argparse.Namespace, workers: int, quantized: bool, checkpointing: bool, *, use_gpu: bool
) -> spec.Pipeline:
    tokens = options.rows * options.length
    return spec.Pipeline.model_validate(
        {
            "model": {"model_name_or_path": str(model), "dtype": "bfloat16", "load_in_4bit": quantized},
            "lora": {"r": 16, "lora_alpha": 32.0},
            "data": {"datasets": [{"path": "random"}], "eval_datasets": [{"path": "random"}], "max_length": options.length},
            "training": {
                "learning_rate": 1e-4, "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "tokens_per_step": tokens * workers,
                "micro_batch_tokens": tokens, "gradient_checkpointing": checkpointing, "logging_steps": 1,
                "eval_steps": 10_000, "save_steps": options.steps,
            },
            "scaling": {"num_workers": workers, "use_gpu": use_gpu},
            "run": {"name": "baseline"},
        }
    )  # fmt: skip


def records_of(
    options: argparse.Namespace,
    variant: str,
    system: str,
    speeds: list[float],
    peak: int,
    loss: float,
    steps: int,
    workers: int = 1,
) -> list[dict[str, Any]]:
    """Speed (tok/s, of `speeds`, one a step), peak memory (bytes in, GB out) and last loss of one run, as they are kept in results."""
    common = {
        "suite": "training", "workload": f"{options.rows}x{options.length}", "model": options.size, "variant": variant, "system": system,
        "command": f"python benchmarks/training/{Path(sys.argv[0]).name} " + " ".join(sys.argv[1:]), "commit": options.commit,
        "hardware": hardware(workers), "versions": versions(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    speed = {"value": statistics.median(speeds), "min": min(speeds), "max": max(speeds), "runs": len(speeds)}
    last = {"GB peak on rank 0": peak / 1e9, "last loss": loss}
    return [
        {**common, **speed, "unit": "tok/s", "higher_is_better": True},
        *(
            {**common, "value": value, "min": value, "max": value, "runs": steps, "unit": unit, "higher_is_better": False}
            for unit, value in last.items()
        ),
    ]


def hardware(workers: int) -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return f"{workers} x {name}" if workers > 1 else str(name)


def versions() -> dict[str, str]:
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "ray", "bitsandbytes")
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **found}


if __name__ == "__main__":
    main()
