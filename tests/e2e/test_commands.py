"""The commands that start nothing: fast, clear, with exit codes for scripts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from altiplano.pipeline.workspace import Workspace

from .conftest import write_pipeline

ROOT = Path(__file__).parents[2]


def altiplano(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "altiplano.cli", *arguments], capture_output=True, text=True, timeout=120)


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv = ['altiplano', '--help']\ntry:\n import altiplano.cli as c; c.main()\nexcept SystemExit: pass\n"
    code += "heavy = {'torch', 'ray', 'mlflow', 'transformers', 'pydantic'} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_config_shows_values_and_origins() -> None:
    shown = altiplano("config", str(ROOT / "pipelines/demo/pipeline.yaml"), "lora.r=4")
    assert "lora.r: 4  # command line" in shown.stdout
    assert json.loads(altiplano("config", str(ROOT / "pipelines/demo/pipeline.yaml"), "-o", "json").stdout)["lora"]["r"] == 16
    assert json.loads(altiplano("schema").stdout)["title"] == "Pipeline"


def test_data_and_plan_describe_the_demo() -> None:
    file = str(ROOT / "pipelines/demo/pipeline.yaml")
    assert "2,000 training rows" in altiplano("data", file).stdout
    planned = json.loads(altiplano("plan", file, "--usd-per-hour", "2", "-o", "json").stdout)
    assert planned["num_workers"] == 2 and planned["usd"] > 0 and planned["hours_low"] < planned["hours_high"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "absent.yaml"], 2, "cannot be read"),
        (["config", "FILE", "training.lerning_rate=3"], 2, "did you mean"),
        (["data", "FILE", "data.max_length=16"], 2, "longer than data.max_length"),
        (["run", "FILE", "run.storage_path=s3://bucket/runs"], 2, "is no directory"),
        (["status", "-w", "WORK"], 2, "has no runs"),
        (["models", "-w", "WORK"], 4, "altiplano up"),
        (["open", "-w", "WORK"], 4, "altiplano up"),
        (["chat", "hi", "--url", "http://127.0.0.1:9/v1"], 4, "no endpoint answers"),
        (["run", "FILE", "--foreground", "tracking.tracking_uri=http://127.0.0.1:9"], 4, "MLflow does not answer"),
    ],
)
def test_wrong_use_gets_one_message_and_an_exit_code(tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    file = write_pipeline(tmp_path, 8000)
    done = altiplano(*(str(file) if a == "FILE" else str(tmp_path / "nothing") if a == "WORK" else a for a in arguments))
    assert done.returncode == code, done.stderr
    assert words in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_two_pipelines_do_not_share_a_workspace(tmp_path: Path) -> None:
    file = write_pipeline(tmp_path, 8000)
    with Workspace(tmp_path / "work", "other").locked():
        done = altiplano("run", str(file))
    assert done.returncode == 5
    assert "in use by pipeline 'other'" in done.stderr
