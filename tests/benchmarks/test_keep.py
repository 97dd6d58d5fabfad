"""New results take the place of old ones, and every page follows."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ("command", "commit", "hardware", "versions", "date")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the program reads and writes, in a folder of its own."""
    for name in ("README.md", "docs/benchmarks.md", "docs/images/roofline.svg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("*cache*"))
    for results in (tmp_path / "benchmarks/results").iterdir():
        results.chmod(0o644)
    engine = tmp_path / "benchmarks/results/engine.json"
    ours = [r for r in json.loads(engine.read_text()) if r["system"] == "altiplano" and r["variant"] == "bf16"]
    engine.write_text(json.dumps([r for r in ours if r["model"] == "1b" and r["workload"] in ("W1", "W4")]))
    return tmp_path


def keep(checkout: Path, rows: Any) -> "subprocess.CompletedProcess[str]":
    new = checkout / "new.json"
    new.write_text(json.dumps(rows))
    return subprocess.run([sys.executable, str(checkout / "benchmarks/keep.py"), str(new)], capture_output=True, text=True)


def test_a_result_replaces_its_like_and_a_peer_gets_a_column(checkout: Path) -> None:
    kept = checkout / "benchmarks/results/engine.json"
    old = json.loads(kept.read_text())
    assert [r["workload"] for r in old] == ["W1", "W4"]
    ours = old[0] | {"value": 0.625, "min": 0.625, "max": 0.625}
    theirs = ours | {"system": "vllm", "value": 1.25, "max": 1.25, "versions": {"vllm": "0.26.0"}}
    done = keep(checkout, [ours, theirs])
    assert done.returncode == 0, done.stderr
    found = json.loads(kept.read_text())
    assert found == [ours, old[1], theirs]
    for page in ("README.md", "docs/benchmarks.md"):
        assert "| W1 | 1b | bf16 | ms/step | 0.625 | 1.25 (0.625 to 1.25) | 2.00 |" in (checkout / page).read_text()
    for program in ("tables.py", "engine/roofline.py"):
        subprocess.run([sys.executable, str(checkout / "benchmarks" / program), "--check"], check=True)


def test_a_kernel_is_known_by_its_shape(checkout: Path) -> None:
    source = {key: json.loads((checkout / "benchmarks/results/engine.json").read_text())[0][key] for key in SOURCE}
    first = {
        "suite": "kernels", "kernel": "swiglu", "model": "1b", "shape": "64 rows", "us": 2.0, "min": 1.5, "max": 2.5, "runs": 7,
        "bytes": 3145728, "flops": 2621440, "percent": 37.27, "limit": "bytes", **source,
    }  # fmt: skip
    second = first | {"shape": "256 rows"}
    kept = checkout / "benchmarks/results/kernels.json"
    kept.unlink(missing_ok=True)
    for rows in ([first, second], [first | {"us": 1.875}]):
        done = keep(checkout, rows)
        assert done.returncode == 0, done.stderr
    assert json.loads(kept.read_text()) == [first | {"us": 1.875}, second]
    page = (checkout / "docs/benchmarks.md").read_text()
    assert "| swiglu | 64 rows | 1.875 | 37 % (bytes) |\n| swiglu | 256 rows | 2 | 37 % (bytes) |" in page
    refused = keep(checkout, [{key: value for key, value in first.items() if key != "limit"}])
    assert refused.returncode == 1 and "must have the keys suite, kernel, model, shape, us" in refused.stderr


@pytest.mark.parametrize(
    ("change", "message"), [({"runs": None}, "must have the keys"), ({"commit": "unknown"}, "measure again with --commit")]
)
def test_a_result_that_does_not_say_how_it_was_made_is_refused(checkout: Path, change: dict[str, Any], message: str) -> None:
    kept = checkout / "benchmarks/results/engine.json"
    before = kept.read_text()
    row = json.loads(before)[0] | change
    done = keep(checkout, [{key: value for key, value in row.items() if value is not None}])
    assert done.returncode == 1 and message in done.stderr
    assert kept.read_text() == before
