"""The verdict: may the candidate replace what is served now?"""

import json
from pathlib import Path
from typing import Any

from altiplano.evaluate import Scores, compare, label
from altiplano.pipeline.context import Context, Stage
from altiplano.pipeline.ledger import Outputs
from altiplano.pipeline.stages.evaluate import BASE, CANDIDATE, CHAMPION
from altiplano.pipeline.stages.lineage import collect
from altiplano.pipeline.workspace import write_json
from altiplano.registry import gate


def _inputs(context: Context) -> dict[str, Any]:
    return {"scores": context.outputs("evaluate")["scores_digest"], "gate": context.pipeline.gate.model_dump(mode="json")}


def _run(context: Context) -> Outputs:
    settings = context.pipeline.gate
    scores = {
        name: Scores(**values)
        for name, values in json.loads(Path(context.outputs("evaluate")["scores_path"]).read_text()).items()
    }
    comparisons = {
        rival: compare(
            scores[CANDIDATE], scores[rival], alpha=settings.alpha, bootstrap_samples=settings.bootstrap_samples, seed=0
        )
        for rival in (BASE, CHAMPION)
        if rival in scores
    }
    verdict = gate.decide(
        settings,
        comparisons,
        latency={name: score.seconds_per_token for name, score in scores.items()},
        missing_lineage=[*collect(context, verdict="pending").missing(), *_unpinned(context)],
    )
    directory = context.workspace.stage_dir("gate")
    write_json(directory / "verdict.json", verdict.to_json())
    (directory / "verdict.md").write_text(verdict.to_markdown())
    for name in ("verdict.json", "verdict.md"):
        context.tracked.log_artifact(directory / name)
    context.tracked.set_tags({"altiplano.verdict": verdict.decision})
    primary = comparisons[CHAMPION if CHAMPION in comparisons else BASE][settings.primary]
    context.tracked.log_metrics(
        {"gate/delta": primary.delta, "gate/ci_low": primary.ci_low, "gate/ci_high": primary.ci_high}, step=0
    )
    return {
        "verdict_path": str(directory / "verdict.json"),
        "decision": verdict.decision,
        "reasons": list(verdict.reasons),
        "primary": settings.primary,
        "label": label(settings.primary),
        "rival": CHAMPION if CHAMPION in comparisons else BASE,
        "baseline": primary.baseline,
        "candidate": primary.candidate,
        "delta": primary.delta,
        "ci_low": primary.ci_low,
        "ci_high": primary.ci_high,
        "p_value": primary.p_value,
    }


def _unpinned(context: Context) -> list[str]:
    """A hub model without a revision may be another one tomorrow."""
    model = context.pipeline.model
    local = model.model_name_or_path == "cria" or Path(model.model_name_or_path).is_dir()
    return [] if local or model.model_revision else ["model.model_revision"]


def _summary(outputs: Outputs) -> str:
    return (
        f"{outputs['decision']}: {outputs['primary']} {outputs['baseline']:.3f} ({outputs['rival']}) → {outputs['candidate']:.3f}, "
        f"gain {outputs['delta']:+.3f} [{outputs['ci_low']:+.3f}, {outputs['ci_high']:+.3f}]"
    )


STAGE = Stage("gate", _inputs, _run, _summary)
