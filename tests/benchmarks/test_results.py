"""What the pages say is what the committed results say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMON = {"suite", "model", "runs", "min", "max", "command", "commit", "hardware", "versions", "date"}
KEYS = COMMON | {"workload", "variant", "system", "value", "unit", "higher_is_better"}
KERNEL_KEYS = COMMON | {"kernel", "shape", "us", "bytes", "flops", "percent", "limit"}


def test_the_tables_are_made_from_the_results() -> None:
    subprocess.run([sys.executable, str(ROOT / "benchmarks/tables.py"), "--check"], check=True)


def test_every_result_says_how_it_was_made() -> None:
    # What works with what is no number: tests/engine/test_feature_matrix.py looks after it.
    files = [file for file in sorted((ROOT / "benchmarks/results").glob("*.json")) if file.name != "features.json"]
    assert files
    for file in files:
        for record in json.loads(file.read_text()):
            kernel = record["suite"] == "kernels"
            assert set(record) == (KERNEL_KEYS if kernel else KEYS), file
            assert record["min"] <= record["us" if kernel else "value"] <= record["max"]
            assert record["command"].startswith("python ")
            # An empty cache and a peer's compilation cost a minute each.
            once = not kernel and record["workload"].startswith(("start", "cold-start", "first-start"))
            assert record["runs"] >= (1 if once else 3)


def test_a_kernels_percentage_follows_from_its_bytes_and_operations() -> None:
    """And no bench claims more than the card's data sheet has, 4.8 TB/s and 989 TFLOP/s: that would be bytes from its cache, or launches
    that do less than they should."""
    file = ROOT / "benchmarks/results/kernels.json"
    for r in json.loads(file.read_text()) if file.exists() else []:
        moved, done = r["bytes"] / 4.22e12, r["flops"] / 747e12
        assert r["percent"] == pytest.approx(100 * max(moved, done) / (r["us"] * 1e-6), rel=0.01, abs=0.01), r
        assert r["limit"] == ("bytes" if moved >= done else "operations")
        # Products of 8 bits are twice as fast as those of bf16 that the limit is of.
        most = 114 if r["limit"] == "bytes" else 265 if r["kernel"] == "w8a8" else 133
        assert 0 <= r["percent"] <= most, r
