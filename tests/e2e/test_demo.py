"""The demo as its README promises it: a base that cannot do the task, and a tuned model that can."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from altiplano.cluster import local_ray, processes

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_demo_teaches_cria_the_task(tmp_path: Path) -> None:
    work = tmp_path / "work"
    arguments = [str(ROOT / "pipelines/demo/pipeline.yaml"), f"run.storage_path={work}", f"serve.port={processes.free_port()}"]
    command = [sys.executable, "-m", "altiplano.cli"]
    try:
        done = subprocess.run(
            [*command, "run", *arguments], capture_output=True, text=True, timeout=850, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, done.stderr
        shown = subprocess.run([*command, "status", "-w", str(work), "-o", "json"], capture_output=True, text=True, check=True)
        summary = json.loads(shown.stdout)
        assert summary["evaluation"]["base"]["exact_match"] < 0.1
        assert summary["evaluation"]["candidate"]["exact_match"] >= 0.9
        assert json.loads(summary["chat"]["answer"]), "the champion answers in JSON"
    finally:
        local_ray.stop(work)
