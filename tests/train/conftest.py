"""Small prepared data on cria, and one Ray for all runs."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from altiplano import spec
from altiplano.cluster.processes import free_port
from altiplano.data import Prepared, prepare
from altiplano.models.loading import load_tokenizer
from altiplano.models.manifest import MANIFEST, ManifestError, verify_manifest
from altiplano.train.checkpoint import PREFIX

HELD_S = 600.0  # half of what the tests of a held run may take: one whose failure frees nobody ends by itself
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


class Held(Nowhere):
    """Stops the run at the first loss after step `after`, until the file `free` is there: what a test does to a run that goes on
    cannot come too late. A checkpoint of that step is still uploaded."""

    def __init__(self, free: Path, after: int) -> None:
        self._free, self._after = free, after

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        if step == self._after + 1:
            self.hold()

    def hold(self, heard: Callable[[], bool] = lambda: False) -> None:
        pause, deadline = threading.Event(), time.monotonic() + HELD_S
        while not (self._free.exists() or heard()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"held for {HELD_S:.0f} s: what the test waits for has not come")
            pause.wait(0.05)


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


def node_arguments(num_cpus: int) -> dict[str, Any]:
    """A node of Ray. A raylet that has to be told ports by its agents dies when they need 15 s to start, as on a busy machine."""
    names = ("dashboard_agent_listen_port", "metrics_agent_port", "metrics_export_port", "runtime_env_agent_port")
    return {"num_cpus": num_cpus, **{name: free_port() for name in names}}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    environment = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        made = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **node_arguments(4)})
        try:
            ray.init(address=made.address, logging_level="ERROR", log_to_driver=False, runtime_env={"env_vars": environment})
            yield
        finally:
            ray.shutdown()
            made.shutdown()
