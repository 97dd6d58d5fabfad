"""Saved checkpoints on their way to storage: copied aside, given a manifest, uploaded while training goes on."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import ray.train
from ray.train import Checkpoint, CheckpointUploadMode
from transformers import TrainerCallback

from altiplano.models.manifest import write_manifest
from altiplano.train.checkpoint import PREFIX

PREEMPTION_CHECK_STEPS = 10


class ReportCheckpoints(TrainerCallback):
    """Reports every saved checkpoint to Ray Train: rank 0 uploads, all ranks take part because reporting is a barrier.

    Saves at once when the cluster says that a node of this run is about to go.
    """

    def __init__(self, trainer_metrics: Any) -> None:
        self._metrics = trainer_metrics
        self._heeded: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % PREEMPTION_CHECK_STEPS:
            return
        notice = ray.train.get_preemption_info()
        # Once for each notice: it stays until the node is gone.
        if notice is not None and notice != self._heeded:
            self._heeded = notice
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        metrics = self._metrics(state)
        if not state.is_world_process_zero:
            ray.train.report(metrics)
            return
        # The trainer deletes old checkpoints of its own folder while the upload may still be reading: hand over a copy.
        copy = Path(tempfile.mkdtemp(prefix="altiplano-checkpoint-"))
        shutil.copytree(Path(args.output_dir) / f"checkpoint-{state.global_step}", copy, dirs_exist_ok=True)
        write_manifest(copy)
        ray.train.report(
            metrics,
            checkpoint=Checkpoint.from_directory(copy),
            checkpoint_dir_name=f"{PREFIX}{state.global_step:06d}",
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )
