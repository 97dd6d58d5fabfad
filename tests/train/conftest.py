"""Small prepared data on cria, and one Ray for all runs."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from altiplano import spec
from altiplano.data import Prepared, prepare
from altiplano.models.loading import load_tokenizer
from altiplano.models.manifest import MANIFEST, ManifestError, verify_manifest
from altiplano.train.checkpoint import PREFIX

# What Ray warns of itself: once a process about settings that nobody has set, and where its sockets and processes, or those of tests before,
# are collected, which may be in any module.
RAY = (
    r"ignore:`use_\w+` is deprecated:DeprecationWarning:ray\.data\.context",
    "ignore:unclosed:ResourceWarning",
    "ignore:subprocess .* is still running:ResourceWarning",
)


class Nowhere:
    """A sink that keeps nothing: metrics of other processes are read from results."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        return None

    def set_tags(self, tags: Mapping[str, str]) -> None:
        return None


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("rows")
    for name, start, count in (("train", 0, 96), ("eval", 1000, 12)):
        turns = [[("user", f"Code of {n}?"), ("assistant", f"code:{n}!" * (1 + n % 3))] for n in range(start, start + count)]
        text = "".join(json.dumps({"messages": [{"role": r, "content": c} for r, c in row]}) + "\n" for row in turns)
        (directory / f"{name}.jsonl").write_text(text)
    return directory


def whole_steps(run_dir: Path) -> list[int]:
    """Steps whose checkpoints can be gone on from. An upload's files come in any order: a manifest alone says nothing."""
    steps = []
    for manifest in run_dir.glob(f"{PREFIX}*/{MANIFEST}"):
        with suppress(ManifestError, FileNotFoundError):
            verify_manifest(manifest.parent)
            steps.append(int(manifest.parent.name.removeprefix(PREFIX)))
    return steps


def pipeline(rows: Path, **sections: Any) -> spec.Pipeline:
    base: dict[str, Any] = {
        "data": {
            "datasets": [{"path": f"{rows}/train.jsonl"}],
            "eval_datasets": [{"path": f"{rows}/eval.jsonl"}],
            "max_length": 128,
        },
        "training": {"learning_rate": 3e-3, "tokens_per_step": 512, "logging_steps": 1, "eval_steps": 5, "save_steps": 4},
        "lora": {"r": 4},
        "run": {"name": "test"},
    }
    for name, values in sections.items():
        base[name] = base.get(name, {}) | values
    return spec.Pipeline.model_validate(base)


@pytest.fixture(scope="session")
def prepared(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Prepared]:
    made = pipeline(rows)
    directory = tmp_path_factory.mktemp("prepared") / "data"
    found = prepare(made.data, load_tokenizer(made.model))
    found.save(directory)
    return directory, found


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    environment = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}
    patch = pytest.MonkeyPatch()
    for name, value in environment.items():
        patch.setenv(name, value)
    ray.init(
        num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False, runtime_env={"env_vars": environment}
    )
    yield
    ray.shutdown()
    patch.undo()
