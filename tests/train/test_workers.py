"""Ray Train: the same run for any number of workers, with workers that die and checkpoints that are damaged."""

import shutil
import threading
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from altiplano.data import Prepared
from altiplano.models.manifest import MANIFEST, verify_manifest
from altiplano.train import TrainResult, fit
from altiplano.train.checkpoint import newest_valid

from .conftest import RAY, Held, Nowhere, pipeline, whole_steps

pytestmark = [
    pytest.mark.filterwarnings(*RAY),
    pytest.mark.timeout(1200),
]
PreparedData = tuple[Path, Prepared]


SAVE_STEPS = 4


def run(rows: Path, prepared: PreparedData, out: Path, workers: int, sink: Nowhere | None = None) -> TrainResult:
    return fit(
        pipeline(rows, scaling={"num_workers": workers}, training={"num_train_epochs": 2, "save_steps": SAVE_STEPS}),
        prepared[0],
        out,
        sink=sink or Nowhere(),
        name="test",
    )


@pytest.fixture(scope="module")
def two_workers(
    cluster: None, rows: Path, prepared: PreparedData, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, TrainResult]:
    out = tmp_path_factory.mktemp("two")
    return out, run(rows, prepared, out, 2)


def test_one_worker_and_two_learn_the_same(
    cluster: None, rows: Path, prepared: PreparedData, two_workers: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    one, two = run(rows, prepared, tmp_path, 1), two_workers[1]
    assert [loss for _, loss in one.loss_curve] == pytest.approx([loss for _, loss in two.loss_curve], abs=1e-4)
    assert one.eval_loss == pytest.approx(two.eval_loss, abs=1e-4)
    assert one.tokens_seen == two.tokens_seen
    assert verify_manifest(two.adapter_dir)


def training_workers() -> list[psutil.Process]:
    """Of all that Ray has started; processes that end while they are looked at are none."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join([process.name(), *process.cmdline()]):
                found.append(process)
    return found


def test_a_run_whose_worker_is_killed_ends_as_if_nothing_had_happened(
    cluster: None, rows: Path, prepared: PreparedData, two_workers: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    free, over, killed, earlier = tmp_path / "free", threading.Event(), list[int](), training_workers()

    def kill_one() -> None:
        try:
            while not whole_steps(tmp_path / "test"):
                if over.wait(0.05):
                    return
            # Those of the run before may not have gone yet.
            victim = [worker for worker in training_workers() if worker not in earlier][-1]
            victim.kill()
            killed.append(victim.pid)
        finally:
            free.touch()

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    try:
        result = run(rows, prepared, tmp_path, 2, Held(free, after=SAVE_STEPS))
    finally:
        over.set()
        killer.join()
    assert killed
    assert result.resumed_from > 0, "it went on from a checkpoint"
    expected = two_workers[1]
    assert result.last_loss == pytest.approx(expected.last_loss, abs=1e-4)
    assert result.eval_loss == pytest.approx(expected.eval_loss, abs=1e-4)
    assert dict(result.loss_curve) == pytest.approx(dict(expected.loss_curve), abs=1e-4)


def test_damaged_checkpoints_are_passed_over(two_workers: tuple[Path, TrainResult], tmp_path: Path) -> None:
    run_dir = tmp_path / "test"
    shutil.copytree(two_workers[0] / "test", run_dir)
    newest, before = sorted(run_dir.glob("step-*"), reverse=True)
    assert newest_valid(run_dir) == newest
    damage(newest / "adapter_model.safetensors")
    assert newest_valid(run_dir) == before
    damage(before / MANIFEST)
    assert newest_valid(run_dir) is None


def damage(file: Path) -> None:
    """Every bit of the last byte: no longer text either."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 0xFF
    file.write_bytes(data)
