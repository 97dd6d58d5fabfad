"""What a pipeline file says, before anything runs: `config`, `data`, `plan`, `schema`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from altiplano.cli.console import Output, OutputOption, out, print_json, table

if TYPE_CHECKING:
    from altiplano.data import Prepared
    from altiplano.spec.loader import Resolved

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="Pipeline file (YAML).", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as training.learning_rate=2e-4.", show_default=False),
]


def register(app: typer.Typer) -> None:
    app.command()(config)
    app.command()(data)
    app.command()(plan)
    app.command()(schema)


def load(file: Path, overrides: Sequence[str] | None) -> "Resolved":
    from altiplano.spec.loader import load as load_spec

    return load_spec(file, tuple(overrides or ()))


def config(file: FileArgument, overrides: OverridesArgument = None, output: OutputOption = Output.text) -> None:
    """Print the resolved file, with the origin of each value."""
    from altiplano.spec.loader import render

    resolved = load(file, overrides)
    if output is Output.json:
        print_json(resolved.pipeline.model_dump(mode="json"))
        return
    for line in render(resolved):
        value, mark, origin = line.partition("  # ")
        out.print(value.replace("[", "\\["), end="")
        out.print(mark + origin, style="dim")


def schema() -> None:
    """Print the JSON schema of pipeline files, for editors."""
    from altiplano.spec.schema import json_schema

    print_json(json_schema())


def data(
    file: FileArgument,
    overrides: OverridesArgument = None,
    rows: Annotated[int, typer.Option(help="Rows to show with their loss mask.")] = 3,
    output: OutputOption = Output.text,
) -> None:
    """Audit the data: counts, lengths, supervised share, and a few rows with the learned words in green."""
    from altiplano.data.preview import segments

    prepared, tokenizer = _prepare(load(file, overrides))
    report = prepared.report
    if output is Output.json:
        print_json(report.to_dict())
        return
    for line in report.lines():
        out.print(line.replace("[", "\\["))
    for example in prepared.train[:rows]:
        out.rule(style="dim")
        for text, supervised in segments(tokenizer, example):
            out.print(text.replace("[", "\\["), style="green" if supervised else "dim", end="")
        out.print()


def plan(
    file: FileArgument,
    overrides: OverridesArgument = None,
    usd_per_hour: Annotated[float | None, typer.Option(help="Price of one worker, for a cost estimate.", min=0)] = None,
    output: OutputOption = Output.text,
) -> None:
    """Say what the run needs: memory, tokens per second, hours, money. Starts nothing."""
    from dataclasses import asdict

    from altiplano import estimate
    from altiplano.models.loading import resolve_model_path

    resolved = load(file, overrides)
    prepared, _ = _prepare(resolved)
    shape = estimate.read_shape(resolve_model_path(resolved.pipeline.model))
    needed = estimate.plan(
        resolved.pipeline, shape, estimate.detect(resolved.pipeline.scaling.use_gpu), prepared.report.train_tokens, usd_per_hour
    )
    if output is Output.json:
        print_json(asdict(needed))
        return
    gib = 1 << 30
    memory = [[name, f"{value / gib:.2f} GiB"] for name, value in asdict(needed.memory).items()]
    out.print(
        table(
            f"Memory of one worker ({needed.hardware})",
            ["part", ">size"],
            [*memory, ["total", f"{needed.memory.total / gib:.2f} GiB"]],
        )
    )
    out.print(
        f"\n{needed.num_workers} workers, {needed.micro_batch_tokens:,} tokens per forward pass, about {needed.tokens_per_second:,.0f} tokens/s\n"
        f"{needed.tune_tokens:,} tokens in the sweep, {needed.train_tokens:,} in the final run\n"
        f"{_duration(needed.hours)} (between {_duration(needed.hours_low)} and {_duration(needed.hours_high)})"
    )
    if needed.usd is not None:
        out.print(f"about ${needed.usd:.2f}")


def _prepare(resolved: "Resolved") -> "tuple[Prepared, object]":
    from altiplano.data import prepare
    from altiplano.models.loading import load_tokenizer

    tokenizer = load_tokenizer(resolved.pipeline.model)
    return prepare(resolved.pipeline.data, tokenizer), tokenizer


def _duration(hours: float) -> str:
    minutes = hours * 60
    return f"{hours:.1f} h" if hours >= 2 else f"{minutes:.0f} min" if minutes >= 2 else f"{minutes * 60:.0f} s"
