"""Rows become tokens, after an audit that stops everything when a row would teach nothing or something wrong."""

from pathlib import Path
from typing import Any

import fsspec

from altiplano.data import prepare
from altiplano.models.loading import load_tokenizer, resolve_model_path
from altiplano.models.manifest import ManifestError, digest_file, verify_manifest
from altiplano.pipeline.context import Context, Stage
from altiplano.pipeline.ledger import Outputs, Record


def _inputs(context: Context) -> dict[str, Any]:
    data = context.pipeline.data
    sources = [*data.datasets, *data.eval_datasets]
    return {
        "data": data.model_dump(mode="json"),
        "contents": {source.path: _fingerprint(source.path) for source in sources},
        "tokenizer": digest_file(resolve_model_path(context.pipeline.model) / "tokenizer.json"),
    }


def _fingerprint(path: str) -> str:
    """Changes when the contents of a local or remote file change; a hub id is pinned by its revision instead."""
    filesystem, name = fsspec.core.url_to_fs(path)
    return str(filesystem.ukey(name)) if filesystem.exists(name) else "hub"


def _run(context: Context) -> Outputs:
    data = context.pipeline.data
    prepared = prepare(data, load_tokenizer(context.pipeline.model))
    directory = context.workspace.stage_dir("data")
    prepared.save(directory)
    report = prepared.report
    context.tracked.log_params({"rows": len(prepared.train), "eval_rows": len(prepared.eval), "max_length": data.max_length})
    context.tracked.log_metrics(
        {"data/supervised_fraction": report.supervised_fraction, "data/tokens": float(report.train_tokens)}, step=0
    )
    for kind, sources, file, count in (
        ("training", data.datasets, "train.jsonl", len(prepared.train)),
        ("evaluation", data.eval_datasets, "eval.jsonl", len(prepared.eval)),
    ):
        named = ",".join(s.path for s in sources)
        context.tracked.log_dataset(name=kind, digest=digest_file(directory / file), source=named, rows=count, context=kind)
    context.tracked.log_dict(report.to_dict(), "audit.json")
    return {
        "prepared_path": str(directory),
        "digest": prepared.digest,
        "template_digest": prepared.template_digest,
        "rows": len(prepared.train),
        "eval_rows": len(prepared.eval),
        "tokens": report.train_tokens,
        "warnings": [str(warning) for warning in report.warnings],
    }


def _summary(outputs: Outputs) -> str:
    return f"{outputs['rows']} rows to learn from ({outputs['tokens']:,} tokens), {outputs['eval_rows']} held out"


def _holds(context: Context, record: Record) -> bool:
    """The tokens are still those that were written."""
    try:
        verify_manifest(Path(record.outputs["prepared_path"]))
    except ManifestError:
        return False
    return True


STAGE = Stage("data", _inputs, _run, _summary, _holds)
