"""What one Ray Train worker does: build the trainer, go on from the last good checkpoint, train, report."""

import json
import tempfile
from pathlib import Path
from typing import Any

import ray.train
import torch
from transformers import TrainerCallback

from altiplano import spec
from altiplano.data import Prepared
from altiplano.train.checkpoint import PREFIX, newest_valid
from altiplano.train.job import Job
from altiplano.train.report import ReportCheckpoints
from altiplano.train.sink import MetricSink
from altiplano.train.trainer import NonFiniteLossError, TokenBudgetTrainer, build_trainer

RATE_FILE = "learning_rate_scale.json"


class Curve(TrainerCallback):
    """Held-out loss every eval_steps, and the learning rate's reduction after a NaN restart."""

    def __init__(self, prepared: Prepared, eval_steps: int, sink: MetricSink, scale: float) -> None:
        self._prepared, self._every, self._sink, self._scale = prepared, eval_steps, sink, scale
        self.trainer: TokenBudgetTrainer | None = None
        self.eval_loss = float("nan")
        self.resumed_from = 0

    def on_train_begin(
        self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if lr_scheduler is None or optimizer is None or self._scale == 1.0:
            return
        # The checkpoint brought both back as they were: the base for the steps to come, and the rate of the very next one.
        for index, group in enumerate(optimizer.param_groups):
            base = args.learning_rate * self._scale
            group["lr"] *= base / lr_scheduler.base_lrs[index]
            lr_scheduler.base_lrs[index] = base
            lr_scheduler._last_lr[index] = group["lr"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self.evaluate(state)

    def evaluate(self, state: Any) -> None:
        """All ranks take part; rank 0 reports."""
        assert self.trainer is not None
        self.eval_loss = self.trainer.held_out_loss(self._prepared.eval)
        if state.is_world_process_zero:
            self._sink.log_metrics({"eval/loss": self.eval_loss}, state.global_step)


def train_loop(job: Job) -> None:
    """Entry point of `TorchTrainer`.

    Raises:
        NonFiniteLossError: after noting that the next attempt goes on with half the learning rate.
    """
    pipeline = spec.Pipeline.model_validate(job.pipeline)
    context = ray.train.get_context()
    if not pipeline.scaling.use_gpu:
        torch.set_num_threads(max(1, int(pipeline.scaling.cpus_per_worker)))
    run_dir, prepared = Path(job.run_dir), Prepared.load(Path(job.prepared_dir))
    curve = Curve(prepared, pipeline.training.eval_steps, job.sink, _rate_scale(run_dir))
    report = ReportCheckpoints(lambda state: _metrics(state, curve, context.get_world_size()))
    with tempfile.TemporaryDirectory(prefix="altiplano-train-") as scratch:
        # All ranks of a node share the folder that rank 0 writes checkpoints to.
        shared = run_dir / "working" if context.get_world_size() > 1 else Path(scratch)
        trainer = build_trainer(
            pipeline, prepared.train, shared, job.sink, save_steps=pipeline.training.save_steps, callbacks=[curve, report]
        )
        curve.trainer = trainer
        resume = newest_valid(run_dir)
        curve.resumed_from = int(resume.name.removeprefix(PREFIX)) if resume else 0
        try:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        except NonFiniteLossError:
            if context.get_world_rank() == 0:
                (run_dir / RATE_FILE).write_text(json.dumps({"scale": _rate_scale(run_dir) / 2}))
            raise
        if resume is not None and trainer.state.global_step == trainer.state.max_steps and curve.eval_loss != curve.eval_loss:
            # The run had ended before it was asked to go on: report its result again.
            curve.evaluate(trainer.state)
            ray.train.report(_metrics(trainer.state, curve, context.get_world_size()))


def _metrics(state: Any, curve: Curve, world_size: int) -> dict[str, Any]:
    """What the driver learns: the whole loss curve, so that nothing depends on which attempt finished."""
    assert curve.trainer is not None
    points = [[entry["step"], entry["loss"]] for entry in state.log_history if "loss" in entry]
    return {
        "step": state.global_step,
        "max_steps": state.max_steps,
        "tokens_seen": curve.trainer.tokens_seen,
        "resumed_from": curve.resumed_from,
        "resumed_tokens": curve.trainer.tokens_until(curve.resumed_from),
        "last_loss": curve.trainer.last_loss,
        "eval_loss": curve.eval_loss,
        "loss_curve": points,
        "world_size": world_size,
    }


def _rate_scale(run_dir: Path) -> float:
    try:
        return float(json.loads((run_dir / RATE_FILE).read_text())["scale"])
    except FileNotFoundError:
        return 1.0
