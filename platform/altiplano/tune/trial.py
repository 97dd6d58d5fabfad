"""One trial: a one-process training run inside a Tune function, measured at fixed numbers of tokens."""

import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import ray.tune
import torch
from transformers import TrainerCallback

from altiplano import spec
from altiplano.data import Prepared
from altiplano.spec.loader import resolve_overrides
from altiplano.train.sink import MetricSink
from altiplano.train.trainer import NonFiniteLossError, TokenBudgetTrainer, build_trainer
from altiplano.tune.job import TrialJob

CHECKPOINT = "state"


class Rungs(TrainerCallback):
    """Measures the fixed slice at every multiple of the grace period and reports, with a checkpoint to go on from."""

    def __init__(self, tune: spec.Tune, prepared: Prepared, sink: MetricSink) -> None:
        self._tune, self._slice, self._sink = tune, prepared.eval[: tune.eval_rows], sink
        self._next = tune.scheduler.grace_period
        self.trainer: TokenBudgetTrainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        seen, last = self.trainer.tokens_seen, state.global_step == state.max_steps
        if seen < self._next and not last:
            return
        self._next = (seen // self._tune.scheduler.grace_period + 1) * self._tune.scheduler.grace_period
        loss = self.trainer.held_out_loss(self._slice)
        self._sink.log_metrics({"eval/loss": loss}, state.global_step)
        # A finished trial counts as its whole budget, even when the last step ends a few tokens before it.
        report = {"eval/loss": loss, "tokens_seen": max(seen, self._tune.scheduler.max_t) if last else seen}
        with tempfile.TemporaryDirectory() as folder:
            self.trainer.save_model(str(Path(folder) / CHECKPOINT))
            shutil.copytree(self._saved(state), Path(folder) / CHECKPOINT, dirs_exist_ok=True)
            ray.tune.report(report, checkpoint=ray.tune.Checkpoint.from_directory(folder))

    def _saved(self, state: Any) -> Path:
        """The trainer's own full checkpoint of this step."""
        assert self.trainer is not None
        self.trainer._save_checkpoint(self.trainer.model, trial=None)
        return Path(self.trainer.args.output_dir) / f"checkpoint-{state.global_step}"


def run_trial(config: dict[str, Any], job: TrialJob) -> None:
    """The Tune function. Ends with a pruned-looking report when the loss stops being finite."""
    pipeline = resolve_overrides(spec.Pipeline.model_validate(job.pipeline), config)
    assert pipeline.tune is not None
    torch.set_num_threads(max(1, int(pipeline.scaling.cpus_per_trial)))
    sink = job.open_sink(ray.tune.get_context().get_trial_name(), config)
    prepared = Prepared.load(Path(job.prepared_dir))
    rungs = Rungs(pipeline.tune, prepared, sink)
    with tempfile.TemporaryDirectory(prefix="altiplano-trial-") as scratch:
        trainer = build_trainer(
            pipeline, prepared.train, Path(scratch), sink, total_tokens=pipeline.tune.scheduler.max_t, callbacks=[rungs]
        )
        rungs.trainer = trainer
        checkpoint = ray.tune.get_checkpoint()
        try:
            if checkpoint is None:
                trainer.train()
            else:
                with checkpoint.as_directory() as folder:
                    trainer.train(resume_from_checkpoint=str(Path(folder) / CHECKPOINT))
        except NonFiniteLossError:
            sink.set_tags({"altiplano.pruned": "the loss is not finite"})
            ray.tune.report({"eval/loss": math.inf, "tokens_seen": trainer.tokens_seen})
