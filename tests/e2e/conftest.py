"""A pipeline small enough to run whole in a test: 160 short rows, one trial pair, one epoch."""

import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

TINY = """\
data:
  datasets: [{path: train.jsonl}]
  eval_datasets: [{path: eval.jsonl}]
  max_length: 128
training: {learning_rate: 5.0e-3, num_train_epochs: 1, tokens_per_step: 512, eval_steps: 100, save_steps: 8, logging_steps: 2}
lora: {r: 8}
tune:
  num_samples: 2
  max_concurrent_trials: 2
  eval_rows: 8
  scheduler: {max_t: 2000, grace_period: 1000, reduction_factor: 2}
  search_space: {training.learning_rate: {loguniform: [2.0e-3, 1.0e-2]}}
scaling: {num_workers: 2}
evaluate: {tasks: [perplexity, exact_match], max_new_tokens: 16}
gate: {primary: perplexity}
run: {name: tiny}
serve: {max_model_len: 256, kv_cache_tokens: 4096, max_num_seqs: 8}
"""


def not_here(why: str) -> None:
    """A check that this machine cannot make: an error where everything must be there (CI), else a note."""
    if os.environ.get("ALTIPLANO_TEST_EVERYTHING"):
        pytest.fail(why)
    print(f"not checked: {why}")


def write_pipeline(directory: Path, port: int) -> Path:
    """A pipeline file with its data in `directory`."""
    rng = random.Random(0)
    for name, count in (("train", 160), ("eval", 24)):
        rows = []
        for index in range(count):
            number = rng.randint(0, 10_000) * 100 + index + (0 if name == "train" else 50)
            turns = (("user", f"Code of {number}?"), ("assistant", f"code:{number}!"))
            rows.append(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}))
        (directory / f"{name}.jsonl").write_text("\n".join(dict.fromkeys(rows)) + "\n")
    path = directory / "pipeline.yaml"
    path.write_text(
        TINY.replace("serve: {", f"serve: {{port: {port}, ").replace(
            "run: {name: tiny}", f"run: {{name: tiny, storage_path: {directory}/work}}"
        )
    )
    return path


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory on a small disk of its own where this user may mount one."""
    made = tmp_path_factory.mktemp("pipeline")
    mount = ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(made)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    yield made
    if mounted:
        subprocess.run(["umount", "--lazy", str(made)], check=True)
