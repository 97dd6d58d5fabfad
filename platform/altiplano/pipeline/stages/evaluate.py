"""Candidate, base and present champion, measured on the same held-out rows by the engine that will serve them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from altiplano.data import Prepared
from altiplano.evaluate import measure
from altiplano.models.loading import resolve_model_path
from altiplano.pipeline.context import Context, Stage
from altiplano.pipeline.ledger import Outputs
from altiplano.pipeline.workspace import write_json
from altiplano.registry import ModelRegistry

BASE, CANDIDATE, CHAMPION = "base", "candidate", "champion"


def _inputs(context: Context) -> dict[str, Any]:
    # The champion of the moment is left out on purpose: once the candidate is champion itself, nothing has to be measured again.
    return {
        "adapter": context.outputs("train")["adapter_digest"],
        "data": context.outputs("data")["digest"],
        "model": context.pipeline.model.model_dump(mode="json"),
        "evaluate": context.pipeline.evaluate.model_dump(mode="json"),
    }


def _run(context: Context) -> Outputs:
    pipeline = context.pipeline
    directory = context.workspace.stage_dir("evaluate")
    adapters: dict[str, Path | None] = {BASE: None, CANDIDATE: Path(context.outputs("train")["adapter_path"])}
    champion = _champion(context, directory)
    if champion is not None:
        adapters[CHAMPION] = champion
    context.progress("evaluate", f"{' and '.join(adapters)} on {context.outputs('data')['eval_rows']} rows")
    scores = measure(
        resolve_model_path(pipeline.model),
        adapters,
        Prepared.load(context.workspace.stage_dir("data")).eval_rows,
        pipeline.evaluate,
        max_model_len=pipeline.serve.max_model_len,
        dtype=pipeline.model.dtype,
        device="cuda" if pipeline.scaling.use_gpu else "cpu",
    )
    for subject, score in scores.items():
        context.tracked.log_metrics({f"{subject}/{name}": value for name, value in score.summary.items()}, step=0)
    path = directory / "scores.json"
    write_json(path, {subject: asdict(score) for subject, score in scores.items()})
    context.tracked.log_artifact(path)
    return {
        "scores_path": str(path),
        "summary": {subject: dict(score.summary) for subject, score in scores.items()},
        "seconds_per_token": {subject: score.seconds_per_token for subject, score in scores.items()},
    }


def _champion(context: Context, directory: Path) -> Path | None:
    """The present champion's adapter, downloaded and checked; None for the first model of its name."""
    registry = ModelRegistry(context.services.tracking_uri)
    version = registry.get(context.registered_name, CHAMPION)
    if version is None:
        return None
    return registry.download(context.registered_name, version.version, directory / f"champion-{version.version}")


def _summary(outputs: Outputs) -> str:
    base, candidate = outputs["summary"][BASE], outputs["summary"][CANDIDATE]
    shared = [name for name in candidate if name in base]
    return ", ".join(f"{name} {base[name]:.3g} → {candidate[name]:.3g}" for name in shared)


STAGE = Stage("evaluate", _inputs, _run, _summary)
