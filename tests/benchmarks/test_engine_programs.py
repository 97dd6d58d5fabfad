"""The programs that measure engines: the figures follow from the times, and a part that fails costs only itself."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks/engine"

TINY = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
# A peer of known speed on a clock that nothing else moves: 10 microseconds a step. It fails on batches of 64.
VLLM = """
import time
from types import SimpleNamespace

now = time.perf_counter()
time.perf_counter = lambda: now

class SamplingParams:
    def __init__(self, max_tokens, **rest):
        self.n = max_tokens

class LLM:
    def __init__(self, **settings):
        assert not settings["enable_prefix_caching"]

    def generate(self, prompts, params, use_tqdm):
        if len(prompts) == 64:
            raise RuntimeError("out of memory")
        global now
        now += 1e-5 * max(p.n for p in params)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * p.n)]) for p in params]
"""


@pytest.fixture(scope="module")
def definitions() -> Any:
    return program("definitions")


@pytest.fixture(scope="module")
def checkpoint(definitions: Any) -> Any:
    return program("checkpoint")


def program(name: str) -> Any:
    found = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    found.loader.exec_module(module)
    return module


def measured(definitions: Any) -> tuple[dict[str, tuple[list[float], str]], list[list[list[int]]]]:
    """All workloads on a system that takes 1 ms per 1 000 prompt tokens and 2 ms per step; and the prompts that it got."""
    sent: list[list[list[int]]] = []
    records: dict[str, tuple[list[float], str]] = {}

    class Exact(definitions.Workloads):  # type: ignore[misc]
        def seconds(self, prompts: list[list[int]], lengths: list[int], temperature: float = 0.0) -> float:
            sent.append(prompts)
            return sum(map(len, prompts)) / 1e6 + max(lengths) * 2e-3

        def record(self, workload: str, values: list[float], unit: str, higher: bool) -> None:
            records[workload] = values, unit

    system = Exact()
    for run in definitions.WORKLOADS.values():
        run(system)
    return records, sent


def test_figures_follow_from_the_times(definitions: Any) -> None:
    records, _ = measured(definitions)
    assert list(records) == ["W1", "W2-B8", "W2-B64", "W2-B256", "W4", "W3-256", "W3-1024"]
    for name in ("W1", "W2-B8", "W2-B64", "W2-B256"):
        values, unit = records[name]
        assert unit == "ms/step" and values == pytest.approx([2.0] * 3)
    prompts = 128 * 1024
    values, unit = records["W4"]
    assert unit == "tok/s" and values == pytest.approx([prompts / (prompts / 1e6 + 2e-3)] * 3)
    values, unit = records["W3-256"]
    # Lengths in and out are 562 on average, and the longest answer is close to 1 024.
    assert unit == "output tok/s" and values[0] == pytest.approx(256 * 562 / (256 * 562 / 1e6 + 1024 * 2e-3), rel=0.1)


def test_every_system_gets_the_same_prompts(definitions: Any) -> None:
    _, first = measured(definitions)
    _, second = measured(definitions)
    assert first == second
    assert all(0 <= token < 128000 for prompts in first for prompt in prompts for token in prompt)


def test_a_record_is_on_disk_as_soon_as_it_is_measured(definitions: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    records = definitions.Records("1b", "vllm", "abc", "NVIDIA H200", {"vllm": "0.26.0"}, out)
    for count in (1, 2):
        records.add(f"W{count}", "bf16", [3.0, 1.0, 2.123456], "ms/step", False, "python x.py")
        assert len(json.loads(out.read_text())) == count
    assert {key: records.rows[0][key] for key in ("value", "min", "max", "runs")} == {
        "value": 2.1235,
        "min": 1,
        "max": 3,
        "runs": 3,
    }


def test_the_age_of_a_process_counts_from_its_start() -> None:
    code = "import time; time.sleep(0.3); import definitions; print(definitions.process_seconds())"
    age = float(subprocess.run([sys.executable, "-c", code], cwd=FOLDER, check=True, capture_output=True, text=True).stdout)
    assert 0.3 <= age < 60


@pytest.fixture
def peer_machine(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine with the peer above and a GPU's tool."""
    (tmp_path / "vllm.py").write_text(VLLM)
    metadata = tmp_path / "vllm-9.9.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 9.9\n")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho NVIDIA H200\n")
    tool.chmod(0o755)
    return os.environ | {"PYTHONPATH": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def test_a_workload_that_fails_costs_only_itself(peer_machine: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, str(FOLDER / "peers.py"), "vllm", "1b", "--only", "W1,W2-B64,W2-B8", "--out", str(out)],
        env=peer_machine,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "out of memory" in done.stderr and done.stderr.endswith("without a result: W2-B64\n")
    rows = json.loads(out.read_text())
    assert [row["workload"] for row in rows] == ["first-start", "W1", "W2-B8"]
    assert [json.loads(line) for line in done.stdout.splitlines()] == rows
    assert all(row["system"] == "vllm" and row["versions"]["vllm"] == "9.9" and row["value"] > 0 for row in rows)
    assert rows[1]["hardware"] == "NVIDIA H200" and rows[1]["runs"] == 3
    assert [row["value"] for row in rows[1:]] == [0.01, 0.01], "ms a step"


def test_a_variant_is_the_peers_own_setting(peer_machine: dict[str, str], tmp_path: Path) -> None:
    program = tmp_path / "vllm.py"
    program.write_text(
        VLLM.replace("        assert not", '        assert settings["kv_cache_dtype"] == "fp8"\n        assert not')
    )
    command = [sys.executable, str(FOLDER / "peers.py"), "vllm", "3b", "--variant", "kv-fp8", "--only", "W1"]
    done = subprocess.run(command, env=peer_machine, capture_output=True, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    assert (row["model"], row["variant"], row["workload"]) == ("3b", "kv-fp8", "W1")
    assert row["command"] == "python benchmarks/engine/peers.py vllm 3b --variant kv-fp8 --only W1"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["vllm", "1b", "--only", "W9"], "no workload W9: use some of W1, W2-B8"),
        (["sglang", "1b", "--variant", "kv-int8"], "sglang has no kv-int8: use one of bf16, kv-fp8"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(asked: list[str], message: str) -> None:
    done = subprocess.run([sys.executable, str(FOLDER / "peers.py"), *asked], capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr


def test_starts_are_timed_from_the_outside_with_caches_of_their_own(peer_machine: dict[str, str], tmp_path: Path) -> None:
    """The stand-in compiles for half a second wherever its cache has nothing."""
    compiling = """
import os, pathlib
cache = pathlib.Path(os.environ["VLLM_CACHE_ROOT"])
def compiled():
    if not cache.exists():
        cache.mkdir()
        time.sleep(0.5)
"""
    text = VLLM.replace("class SamplingParams", compiling + "\nclass SamplingParams")
    (tmp_path / "vllm.py").write_text(text.replace("        assert not", "        compiled()\n        assert not"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    out = tmp_path / "out.json"
    command = [sys.executable, str(FOLDER / "cold_start.py"), "1b", "--system", "vllm", "--checkpoint", str(tmp_path / "model")]
    subprocess.run([*command, "--empty-runs", "2", "--out", str(out)], env=peer_machine, check=True, capture_output=True)
    rows = {row["workload"]: row for row in json.loads(out.read_text())}
    parts = ["imports", "engine", "first step"]
    assert list(rows) == [
        f"{start}{what}" for start in ("cold-start", "start") for what in ("", "-answer", *(f"/{part}" for part in parts))
    ]
    assert (rows["cold-start"]["runs"], rows["start"]["runs"]) == (2, 3)
    assert rows["cold-start/engine"]["min"] >= 0.5
    assert all(row["unit"] == "s" and row["value"] > 0 for row in rows.values())
    assert rows["start"]["value"] <= rows["start-answer"]["value"]


def test_a_start_that_fails_says_what_it_printed(peer_machine: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text("raise SystemExit('no card')")
    (tmp_path / "config.json").write_text("{}")
    command = [sys.executable, str(FOLDER / "cold_start.py"), "1b", "--system", "vllm", "--checkpoint", str(tmp_path)]
    done = subprocess.run([*command, "--runs", "1"], env=peer_machine, check=True, capture_output=True, text=True)
    assert done.stdout == "" and done.stderr.count("no card") >= 2 and "start 1 failed: exit code 1" in done.stderr


def test_a_random_adapter_is_one_that_the_engine_loads(definitions: Any, checkpoint: Any, tmp_path: Path) -> None:
    from altiplano.engine.adapters import MODULES, load_adapter
    from altiplano.engine.config import read_config

    config = definitions.model_config("1b") | TINY | {"intermediate_size": 256, "vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint.write_adapter(config, tmp_path / "adapter", rank=4)
    adapter = load_adapter("a", tmp_path / "adapter", tmp_path, read_config(tmp_path), 16, torch.bfloat16, "cpu")
    assert adapter.rank == 4 and len(adapter.pairs) == 2
    assert all(set(layer) == set(MODULES) for layer in adapter.pairs)
    assert all(down.any() and up.any() for layer in adapter.pairs for down, up, _ in layer.values())


def test_a_random_checkpoint_is_one_that_the_engine_loads(definitions: Any, checkpoint: Any, tmp_path: Path) -> None:
    from altiplano.engine.config import read_config
    from altiplano.engine.weights import load_weights

    config = definitions.model_config("1b") | TINY | {"intermediate_size": 256, "vocab_size": 512}
    checkpoint.write_checkpoint(config, tmp_path, shard_bytes=200_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < 2 * 400_000
    weights = load_weights(tmp_path, read_config(tmp_path), torch.float32, "cpu")
    assert weights.head is weights.embedding and len(weights.layers) == 2
    assert weights.embedding.std() == pytest.approx(0.02, rel=0.02) and bool((weights.norm == 1).all())
    public = sum(torch.Size(shape).numel() for _, shape in checkpoint.shapes(definitions.model_config("3b")))
    assert public == 3_212_749_824
