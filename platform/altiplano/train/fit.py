"""The final run: Ray Train over N workers, to the end or to a clear error."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from altiplano import spec
from altiplano.train.checkpoint import extract_adapter, newest_valid
from altiplano.train.job import Job
from altiplano.train.sink import MetricSink

WORKER_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}


class TrainError(RuntimeError):
    """The run failed more often than failure.max_failures allows."""


@dataclass(frozen=True)
class TrainResult:
    """`loss_curve` is (step, loss) over all attempts; `world_sizes` the number of workers at the end of this call,
    `resumed_from` the step that its last attempt went on from (0: from the beginning)."""

    adapter_dir: Path
    loss_curve: list[tuple[int, float]]
    last_loss: float
    eval_loss: float
    tokens_seen: int
    seconds: float
    tokens_per_second: float
    resumed_from: int
    world_sizes: list[int]


def fit(pipeline: spec.Pipeline, prepared_dir: Path, out: Path, *, sink: MetricSink, name: str) -> TrainResult:
    """Fine-tune on all workers; ray.init has happened. The same `out` and `name` go on where an earlier call was killed.

    Raises:
        TrainError: see the class; the message is that of the first worker that failed.
    """
    run_dir = out / name
    run_dir.mkdir(parents=True, exist_ok=True)
    job = Job(pipeline.model_dump(mode="json"), str(prepared_dir), str(run_dir), sink)
    scaling = pipeline.scaling
    trainer = TorchTrainer(
        _loop,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=scaling.num_workers,
            use_gpu=scaling.use_gpu,
            resources_per_worker=None if scaling.use_gpu else {"CPU": scaling.cpus_per_worker},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(out.resolve()),
            failure_config=FailureConfig(
                max_failures=pipeline.failure.max_failures, max_preemption_failures=pipeline.failure.max_preemption_failures
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=pipeline.training.max_checkpoints),
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},
        ),
    )
    # Ray Train takes it from the environment of whoever starts its controller.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(pipeline.failure.start_timeout_s)
    started = time.monotonic()
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        raise TrainError(_first_cause(error)) from error
    metrics: dict[str, Any] = result.metrics or {}
    final = newest_valid(run_dir)
    if final is None or metrics.get("step") != metrics.get("max_steps"):
        raise TrainError(
            f"the run ended at step {metrics.get('step')} of {metrics.get('max_steps')} without a usable checkpoint in {run_dir}"
        )
    seconds = time.monotonic() - started
    return TrainResult(
        adapter_dir=extract_adapter(final, out / "adapter"),
        loss_curve=[(int(step), float(loss)) for step, loss in metrics["loss_curve"]],
        last_loss=metrics["last_loss"],
        eval_loss=metrics["eval_loss"],
        tokens_seen=metrics["tokens_seen"],
        seconds=seconds,
        tokens_per_second=(metrics["tokens_seen"] - metrics["resumed_tokens"]) / seconds,
        resumed_from=metrics["resumed_from"],
        world_sizes=[metrics["world_size"]],
    )


def _loop(config: dict[str, Any]) -> None:
    from altiplano.train.worker import train_loop  # the training stack: slow to import, and needed by workers only

    train_loop(config["job"])


def _first_cause(error: TrainingFailedError) -> str:
    """The message of the worker that failed first, without Ray's layers around it."""
    failures = getattr(error, "worker_failures", None) or {}
    for rank in sorted(failures):
        cause = getattr(failures[rank], "cause", None) or failures[rank]
        return f"worker {rank}: {type(cause).__name__}: {cause}"
    return str(error)
