"""Candidate, base and present champion, measured on the same held-out rows by the engine that will serve them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from altiplano.data import Prepared
from altiplano.evaluate import measure
from altiplano.models.loading import resolve_model_path
from altiplano.models.manifest import digest_file, verify_manifest
from altiplano.pipeline.context import Context, Stage
from altiplano.pipeline.ledger import Outputs, Record
from altiplano.pipeline.workspace import write_json
from altiplano.registry import ModelRegistry

BASE, CANDIDATE, CHAMPION = "base", "candidate", "champion"


def _inputs(context: Context) -> dict[str, Any]:
    # The champion of the moment is not among them: `_holds` looks at it, and once it is the candidate nothing is measured again.
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
    verify_manifest(Path(context.outputs("train")["adapter_path"]))
    registry = ModelRegistry(context.services.tracking_uri)
    champion = registry.get(context.registered_name, CHAMPION)
    if champion is not None:
        place = directory / f"champion-{champion.version}"
        adapters[CHAMPION] = registry.download(context.registered_name, champion.version, place)
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
        "scores_digest": digest_file(path),
        "champion": champion.version if champion else None,
        "summary": {subject: dict(score.summary) for subject, score in scores.items()},
        "seconds_per_token": {subject: score.seconds_per_token for subject, score in scores.items()},
    }


def _holds(context: Context, record: Record) -> bool:
    """The champion that was measured is still the champion, or the candidate itself has become it."""
    champion = ModelRegistry(context.services.tracking_uri).get(context.registered_name, CHAMPION)
    if champion is None:
        return record.outputs["champion"] is None
    ours = champion.tags.get("adapter_digest") == context.outputs("train")["adapter_digest"]
    return bool(ours or champion.version == record.outputs["champion"])


def _summary(outputs: Outputs) -> str:
    base, candidate = outputs["summary"][BASE], outputs["summary"][CANDIDATE]
    shared = [name for name in candidate if name in base]
    return ", ".join(f"{name} {base[name]:.3g} → {candidate[name]:.3g}" for name in shared)


STAGE = Stage("evaluate", _inputs, _run, _summary, _holds)
