"""The final fine-tune with the settings that the sweep found, on all workers."""

from typing import Any

from altiplano import spec
from altiplano.models.manifest import verify_manifest
from altiplano.pipeline.context import Context, Stage
from altiplano.pipeline.ledger import Outputs
from altiplano.registry import MlflowSink
from altiplano.spec.loader import resolve_overrides
from altiplano.train import fit


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
    sink = MlflowSink(context.services.tracking_uri, context.tracked.run_id, str(context.workspace.spool_dir))
    result = fit(
        pipeline,
        context.workspace.stage_dir("data"),
        context.workspace.stage_dir("train"),
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
    training, lora = pipeline.training, pipeline.lora
    return {
        "model_name_or_path": pipeline.model.model_name_or_path,
        "dtype": pipeline.model.dtype,
        "load_in_4bit": pipeline.model.load_in_4bit,
        "lora.r": lora.r,
        "lora.lora_alpha": lora.lora_alpha,
        "lora.lora_dropout": lora.lora_dropout,
        "lora.target_modules": lora.target_modules,
        "lora.use_rslora": lora.use_rslora,
        "lora.use_dora": lora.use_dora,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.lr_scheduler_type,
        "warmup_ratio": training.warmup_ratio,
        "weight_decay": training.weight_decay,
        "num_train_epochs": training.num_train_epochs,
        "tokens_per_step": training.tokens_per_step,
        "max_length": pipeline.data.max_length,
        "packing": pipeline.data.packing,
        "seed": training.seed,
        "num_workers": pipeline.scaling.num_workers,
    }


def _summary(outputs: Outputs) -> str:
    first, last = outputs["loss_curve"][0][1], outputs["loss_curve"][-1][1]
    return (
        f"loss {first:.3f} → {last:.3f}, held-out loss {outputs['eval_loss']:.3f}, {outputs['tokens_per_second']:,.0f} tokens/s"
    )


STAGE = Stage("train", _inputs, _run, _summary)
