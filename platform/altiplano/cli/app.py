"""The command tree and the one place where errors become messages and exit codes."""

import sys

import typer

from altiplano import __version__
from altiplano.cli import ab, batch, bench, chat, cluster, deploy, files, generate, jobs, keys, models, rollout, runs, servers
from altiplano.cli.console import problem

app = typer.Typer(
    name="altiplano",
    help="Tune, fine-tune, judge and serve Llama 3.2 on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and leave.")) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


for group in (runs, files, models, chat, generate, batch, bench, keys, rollout, ab, servers, cluster, jobs, deploy):
    group.register(app)


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except (ValueError, FileNotFoundError) as error:
        problem(str(error))
        sys.exit(2)
    except ConnectionError as error:
        problem(str(error))
        sys.exit(4)
    except RuntimeError as error:
        problem(str(error))
        sys.exit(getattr(error, "exit_code", 1))
