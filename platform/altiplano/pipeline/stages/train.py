"""The final fine-tune with the settings that the sweep found, on all workers."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from altiplano import spec
from altiplano.models.manifest import ManifestError, verify_manifest
from altiplano.pipeline.context import Context, Stage
from altiplano.pipeline.events import EventLog
from altiplano.pipeline.ledger import Outputs, Record
from altiplano.registry import MlflowSink
from altiplano.spec.loader import resolve_overrides
from altiplano.train import fit


@dataclass(frozen=True)
class LiveSink:
    """Metrics go to MLflow; whoever follows the run sees them as progress. Used on rank 0, in the worker's process."""

    mlflow: MlflowSink
    events_path: str
    total_tokens: float

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.mlflow.log_metrics(metrics, step)
        if "train/loss" not in metrics:
            return
        share = min(1.0, metrics["train/tokens_seen"] / max(1.0, self.total_tokens))
        text = f"step {step}, {share:.0%} of {self.total_tokens:,.0f} tokens, loss {metrics['train/loss']:.3f}, {metrics['train/tokens_per_second']:,.0f} tokens/s"
        with contextlib.suppress(OSError):  # a line for people must not stop a training
            log = EventLog(Path(self.events_path))
            log.emit("progress", stage="train", text=text)
            log.close()

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.mlflow.set_tags(tags)


def tuned(context: Context) -> spec.Pipeline:
    """The pipeline with the best trial's settings in place of the written ones."""
    return resolve_overrides(context.pipeline, context.outputs("tune")["best"])


def _inputs(context: Context) -> dict[str, Any]:
    # The number of workers is left out on purpose: the global batch does not depend on it, so neither does the result.
    pipeline = tuned(context)
    return {
        "data": context.outputs("data")["digest"],
        "model": pipeline.model.model_dump(mode="json"),
        "lora": pipeline.lora.model_dump(mode="json"),
        "training": pipeline.training.model_dump(mode="json"),
    }


def _run(context: Context) -> Outputs:
    pipeline = tuned(context)
    context.tracked.log_params(_params(pipeline))
    mlflow = MlflowSink(context.services.tracking_uri, context.tracked.run_id, str(context.workspace.spool_dir))
    tokens = context.outputs("data")["tokens"] * pipeline.training.num_train_epochs
    sink = LiveSink(mlflow, str(context.workspace.events_file.resolve()), tokens)
    result = fit(
        pipeline,
        context.workspace.stage_dir("data"),
        context.work_dir("train"),
        sink=sink,
        name=context.pipeline.run.name,
    )
    return {
        "adapter_path": str(result.adapter_dir),
        "adapter_digest": verify_manifest(result.adapter_dir),
        "loss_curve": [list(point) for point in result.loss_curve],
        "eval_loss": result.eval_loss,
        "tokens_seen": result.tokens_seen,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "world_sizes": list(result.world_sizes),
        "params": _params(pipeline),
    }


def _params(pipeline: spec.Pipeline) -> dict[str, Any]:
    """The settings that decide a fine-tune, under the names that users know."""
    model, data = pipeline.model.model_dump(mode="json"), pipeline.data
    named = {
        **{
            name: model[name] for name in ("model_name_or_path", "model_revision", "dtype", "attn_implementation", "load_in_4bit")
        },
        **{f"lora.{name}": value for name, value in pipeline.lora.model_dump(mode="json").items()},
        **pipeline.training.model_dump(mode="json", exclude={"logging_steps", "eval_steps", "max_checkpoints"}),
        "max_length": data.max_length,
        "packing": data.packing,
        "assistant_only_loss": data.assistant_only_loss,
        "num_workers": pipeline.scaling.num_workers,
        "use_gpu": pipeline.scaling.use_gpu,
    }
    return {name: value for name, value in named.items() if value is not None}


def _summary(outputs: Outputs) -> str:
    first, last = outputs["loss_curve"][0][1], outputs["loss_curve"][-1][1]
    return (
        f"loss {first:.3f} → {last:.3f}, held-out loss {outputs['eval_loss']:.3f}, {outputs['tokens_per_second']:,.0f} tokens/s"
    )


def _holds(context: Context, record: Record) -> bool:
    """The adapter is still the one that was trained."""
    try:
        return bool(verify_manifest(Path(record.outputs["adapter_path"])) == record.outputs["adapter_digest"])
    except ManifestError:
        return False


STAGE = Stage("train", _inputs, _run, _summary, _holds)
