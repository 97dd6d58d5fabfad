"""What the pages say is what the committed results say."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
KEYS = {
    "suite",
    "workload",
    "model",
    "variant",
    "system",
    "value",
    "unit",
    "higher_is_better",
    "runs",
    "min",
    "max",
    "command",
    "commit",
    "hardware",
    "versions",
    "date",
}


def test_the_tables_are_made_from_the_results() -> None:
    subprocess.run([sys.executable, str(ROOT / "benchmarks/tables.py"), "--check"], check=True)


def test_every_result_says_how_it_was_made() -> None:
    # What works with what is no number: tests/engine/test_feature_matrix.py looks after it.
    files = [file for file in sorted((ROOT / "benchmarks/results").glob("*.json")) if file.name != "features.json"]
    assert files
    for file in files:
        for record in json.loads(file.read_text()):
            assert set(record) == KEYS, file
            assert record["min"] <= record["value"] <= record["max"]
            assert record["command"].startswith("python ")
            # An empty cache and a peer's compilation cost a minute each.
            assert record["runs"] >= (1 if record["workload"].startswith(("start", "cold-start", "first-start")) else 3)
