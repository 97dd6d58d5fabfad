"""`altiplano batch`: answer a file of rows."""

import asyncio
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from altiplano.cli.console import Output, OutputOption, err, hint, out, print_json
from altiplano.cli.generate import ApiKeyOption, ModelOption, ParamOption, UrlOption, parameters
from altiplano.client.endpoint import DEFAULT_URL

if TYPE_CHECKING:
    from altiplano.client.batch import Batch, Progress


def register(app: typer.Typer) -> None:
    app.command()(batch)


def batch(
    rows: Annotated[
        Path, typer.Argument(metavar="INPUT", help="Rows: .jsonl or .csv.", show_default=False, exists=True, dir_okay=False)
    ],
    output: Annotated[Path, typer.Argument(help="Answers: .jsonl or .csv.", show_default=False, dir_okay=False)],
    url: UrlOption = DEFAULT_URL,
    api_key: ApiKeyOption = None,
    model: ModelOption = None,
    system: Annotated[str | None, typer.Option(help="System prompt of rows that have none.", show_default=False)] = None,
    template: Annotated[
        str | None, typer.Option(help="Prompt with columns in braces: 'Translate: {text}'.", show_default=False)
    ] = None,
    answer_column: Annotated[str, typer.Option(help="Name of the column with the answers.")] = "answer",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Default: as long as the context.", show_default=False)] = None,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    param: ParamOption = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 16,
    max_retries: Annotated[int, typer.Option(min=0, help="Failures of one row before it is given up.")] = 8,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Forget earlier answers.")] = False,
    output_format: OutputOption = Output.text,
) -> None:
    """Answer every row of a file. A run that was killed goes on where it was; failed rows get a file of their own."""
    from altiplano.client.batch import Batch
    from altiplano.client.rows import Asking

    asked = {"temperature": temperature} | ({"max_tokens": max_tokens} if max_tokens else {}) | parameters(param)
    asking = Asking("", model, system, template, answer_column, asked)
    job = Batch(rows, output, asking, concurrency)
    if overwrite:
        for path in (job.output, job.failed_path, job.journal_path):
            path.unlink(missing_ok=True)
    try:
        progress = asyncio.run(_run(job, url, api_key, max_retries))
    except (KeyboardInterrupt, ConnectionError) as error:
        hint(f"answered rows are kept in {job.journal_path}: run the same command to go on")
        if isinstance(error, KeyboardInterrupt):
            raise typer.Exit(130) from error
        raise
    _report(job, progress, output_format)
    if progress.failed:
        raise typer.Exit(1)


async def _run(job: "Batch", url: str, api_key: str | None, max_retries: int) -> "Progress":
    from dataclasses import replace

    from altiplano.client import Backoff, Endpoint, Sender
    from altiplano.client.batch import run_batch
    from altiplano.client.endpoint import default_model

    endpoint = Endpoint(url, api_key)
    async with endpoint.open(job.concurrency) as client:
        chosen = job.asking.model or await default_model(endpoint, client)
        job = replace(job, asking=replace(job.asking, default_model=chosen))
        with err.status("") as status:
            shown = time.monotonic()

            def show(progress: "Progress") -> None:
                nonlocal shown
                status.update(_line(progress))
                # Where there is no terminal, a line now and then.
                if not err.is_terminal and time.monotonic() - shown > 30:
                    shown = time.monotonic()
                    err.print(_line(progress))

            return await run_batch(job, Sender(endpoint, client, Backoff(max_retries=max_retries)), show)


def _line(progress: "Progress") -> str:
    done = progress.resumed + progress.answered + progress.failed
    return f"{done:,} of {progress.total:,} rows, {progress.failed:,} failed"


def _report(job: "Batch", progress: "Progress", output_format: Output) -> None:
    files = {"output": str(job.output), "failed_output": str(job.failed_path) if progress.failed else None}
    if output_format is Output.json:
        print_json(asdict(progress) | files)
        return
    rate = progress.completion_tokens / progress.seconds if progress.seconds else 0.0
    resumed = f" ({progress.resumed:,} by an earlier run)" if progress.resumed else ""
    out.print(f"{progress.total - progress.failed:,} of {progress.total:,} rows answered{resumed}: {job.output}", markup=False)
    out.print(
        f"{progress.completion_tokens:,} tokens in {progress.seconds:.1f} s, {rate:,.0f} tokens/s, {progress.retries:,} retries"
    )
    if progress.failed:
        err.print(f"{progress.failed:,} failed: {job.failed_path}. Run the same command to ask only them again.", markup=False)
