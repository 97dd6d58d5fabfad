"""The programs that measure fine-tunes leave records of one form, ours and the peer's."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
FOLDER = Path(__file__).parents[2] / "benchmarks/training"
SETTINGS = ["--size", "tiny", "--rows", "1", "--length", "16", "--steps", "8", "--variants", "bf16-lora", "--commit", "abc1234"]


def measured(program: str, folder: Path) -> list[dict[str, Any]]:
    out = folder / f"{program}.json"
    ran = subprocess.run(
        [sys.executable, str(FOLDER / program), *SETTINGS, "--out", str(out)],
        capture_output=True, text=True, timeout=300, cwd=folder, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize(("program", "system"), [("peers.py", "trl"), ("baseline.py", "altiplano")])
def test_a_run_leaves_speed_memory_and_loss(program: str, system: str, tmp_path: Path) -> None:
    speed, memory, loss = measured(program, tmp_path)
    assert [record["unit"] for record in (speed, memory, loss)] == ["tok/s", "GB peak on rank 0", "last loss"]
    assert speed["runs"] == 2 and 0 < speed["min"] <= speed["value"] <= speed["max"] and speed["higher_is_better"]
    assert 6.5 < loss["value"] < 7.5, "random weights know nothing of 1,000 words: the loss is about log 1000"
    for record in (speed, memory, loss):
        assert (record["suite"], record["system"], record["variant"]) == ("training", system, "bf16-lora")
        assert record["command"].startswith(f"python benchmarks/training/{program} --size tiny") and record["commit"] == "abc1234"
        assert record["versions"]["trl"] and record["hardware"]


def test_a_run_too_short_to_be_measured_is_refused(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, str(FOLDER / "peers.py"), "--size", "tiny", "--steps", "6"],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert ran.returncode == 2 and "--steps 6" in ran.stderr and "at least 7" in ran.stderr
