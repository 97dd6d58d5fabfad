"""Everything that a model was made from, gathered for the registry."""

from altiplano.models.loading import resolve_model_path
from altiplano.models.manifest import digest_file
from altiplano.pipeline.context import Context
from altiplano.pipeline.ledger import digest
from altiplano.registry import Lineage


def collect(context: Context, verdict: str) -> Lineage:
    """The lineage of the trained adapter of this run."""
    data, train = context.outputs("data"), context.outputs("train")
    pipeline = context.pipeline
    base = resolve_model_path(pipeline.model)
    weights = {path.name: digest_file(path) for path in sorted(base.glob("*.safetensors"))}
    return Lineage.gather(
        config_digest=digest(pipeline.model_dump(mode="json")),
        base_model=pipeline.model.model_name_or_path,
        base_revision=pipeline.model.model_revision,
        base_digest=digest(weights),
        dataset_digests={"data": data["digest"]},
        template_digest=data["template_digest"],
        date_string=pipeline.data.date_string,
        mask_policy="assistant_only" if pipeline.data.assistant_only_loss else "all",
        seed=pipeline.training.seed,
        world_sizes=train["world_sizes"],
        tokens_seen=train["tokens_seen"],
        adapter_digest=train["adapter_digest"],
        run_ids={name: record.mlflow_run_id for name, record in context.records.items() if record.mlflow_run_id},
        verdict=verdict,
    )
