"""The adapter becomes a version in the registry, with its lineage, its card and, if the gate says so, the champion's alias."""

from pathlib import Path
from typing import Any

from altiplano.pipeline.context import Context, Stage
from altiplano.pipeline.ledger import Outputs
from altiplano.pipeline.stages.lineage import collect
from altiplano.registry import ModelRegistry


class ChampionChangedError(RuntimeError):
    """Somebody else promoted a model after this candidate was measured."""


def _inputs(context: Context) -> dict[str, Any]:
    return {
        "gate": context.records["gate"].digest,
        "name": context.registered_name,
        "adapter": context.outputs("train")["adapter_digest"],
    }


def _run(context: Context) -> Outputs:
    verdict = context.outputs("gate")
    name = context.registered_name
    registry = ModelRegistry(context.services.tracking_uri)
    _check_champion(context, registry)
    version = registry.register(
        Path(context.outputs("train")["adapter_path"]),
        name,
        context.tracked.run_id,
        collect(context, verdict=verdict["decision"]),
        tags={
            "gate": verdict["decision"],
            "summary": f"{verdict['label']} {verdict['candidate']:.3f} ({verdict['rival']} {verdict['baseline']:.3f})",
            "eval_run_id": str(context.records["evaluate"].mlflow_run_id),
        },
        params=context.outputs("train")["params"],
    )
    if verdict["decision"] == "promote":
        registry.promote(name, version)
    elif verdict["decision"] == "inconclusive":
        registry.set_alias(name, "challenger", version)
    champion = registry.get(name, "champion")
    return {"name": name, "version": version, "champion": champion.version if champion else None}


def _check_champion(context: Context, registry: ModelRegistry) -> None:
    champion, compared = registry.get(context.registered_name, "champion"), context.outputs("evaluate")["champion"]
    ours = champion is not None and champion.tags.get("adapter_digest") == context.outputs("train")["adapter_digest"]
    if not ours and (champion.version if champion else None) != compared:
        raise ChampionChangedError(
            f"the champion of {context.registered_name} is version {champion.version if champion else 'none'} now, and the candidate "
            f"was compared with {compared or 'none'}: run the same command again to compare with the present one"
        )


def _summary(outputs: Outputs) -> str:
    champion = f"champion is version {outputs['champion']}" if outputs["champion"] else "no champion yet"
    return f"{outputs['name']} version {outputs['version']}; {champion}"


STAGE = Stage("register", _inputs, _run, _summary)
