"""The programs that measure engines: the figures follow from the times, and a part that fails costs only itself."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks/engine"

# A peer of known speed: 10 microseconds a step, and it fails on batches of 64.
VLLM = """
import time
from types import SimpleNamespace

class SamplingParams:
    def __init__(self, max_tokens, **rest):
        self.n = max_tokens

class LLM:
    def __init__(self, **settings):
        assert settings["load_format"] == "dummy" and not settings["enable_prefix_caching"]

    def generate(self, prompts, params, use_tqdm):
        if len(prompts) == 64:
            raise RuntimeError("out of memory")
        time.sleep(1e-5 * max(p.n for p in params))
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * p.n)]) for p in params]
"""


@pytest.fixture(scope="module")
def definitions() -> Any:
    found = importlib.util.spec_from_file_location("definitions", FOLDER / "definitions.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["definitions"] = module
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
        assert records[name] == (pytest.approx([2.0] * 3), "ms/step")
    prompts = 128 * 1024
    assert records["W4"] == (pytest.approx([prompts / (prompts / 1e6 + 2e-3)] * 3), "tok/s")
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


def test_a_workload_that_fails_costs_only_itself(tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text(VLLM)
    metadata = tmp_path / "vllm-9.9.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 9.9\n")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho NVIDIA H200\n")
    tool.chmod(0o755)
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, str(FOLDER / "peers.py"), "vllm", "1b", "--only", "W1,W2-B64,W2-B8", "--out", str(out)],
        env=os.environ | {"PYTHONPATH": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "out of memory" in done.stderr and done.stderr.endswith("without a result: W2-B64\n")
    rows = json.loads(out.read_text())
    assert [row["workload"] for row in rows] == ["start", "W1", "W2-B8"]
    assert [json.loads(line) for line in done.stdout.splitlines()] == rows
    assert all(row["system"] == "vllm" and row["versions"]["vllm"] == "9.9" and row["value"] > 0 for row in rows)
    assert rows[1]["hardware"] == "NVIDIA H200" and rows[1]["runs"] == 3


def test_an_unknown_workload_is_refused_before_anything_starts() -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "peers.py"), "vllm", "1b", "--only", "W9"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "no workload W9: use some of W1, W2-B8" in done.stderr
