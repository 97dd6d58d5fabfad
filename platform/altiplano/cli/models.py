"""`altiplano models`: what is in the registry."""

from pathlib import Path
from typing import Annotated

import typer

from altiplano.cli.console import Output, OutputOption, out, print_json, table
from altiplano.cli.runs import WorkspaceOption


def register(app: typer.Typer) -> None:
    app.command()(models)


def models(
    name: Annotated[str | None, typer.Argument(help="Registered model; default: all.", show_default=False)] = None,
    workspace: WorkspaceOption = Path(".altiplano"),
    tracking_uri: Annotated[str | None, typer.Option(help="MLflow; default: the workspace's server.", show_default=False)] = None,
    output: OutputOption = Output.text,
) -> None:
    """List registered models with their aliases and verdicts."""
    from altiplano.pipeline.services import find_mlflow
    from altiplano.registry import ModelRegistry

    uri = tracking_uri or find_mlflow(workspace.resolve())
    if uri is None:
        raise ConnectionError(f"no MLflow runs for {workspace.resolve()}: start it with `altiplano up`, or give --tracking-uri")
    registry = ModelRegistry(uri)
    versions = [v for n in ([name] if name else registry.names()) for v in registry.versions(n)]
    if output is Output.json:
        print_json(
            [
                {"name": v.name, "version": v.version, "aliases": list(v.aliases), "tags": dict(v.tags), "run_id": v.run_id}
                for v in versions
            ]
        )
        return
    rows = [[v.name, str(v.version), ", ".join(v.aliases), v.tags.get("gate", ""), v.tags.get("summary", "")] for v in versions]
    out.print(table("", ["model", ">version", "aliases", "gate", "summary"], rows))
