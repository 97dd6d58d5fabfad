"""`altiplano run` and `altiplano status`: start a pipeline, follow it, leave it, come back to it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from altiplano.cli import view
from altiplano.cli.console import Output, OutputOption, err, hint, out, print_json, problem
from altiplano.cli.files import FileArgument, OverridesArgument, load

if TYPE_CHECKING:
    from altiplano import spec
    from altiplano.pipeline.workspace import Workspace

# Tests put a driver in its place that stands still where they want it to.
DRIVER = [sys.executable, "-m", "altiplano.pipeline.driver"]
WorkspaceOption = Annotated[Path, typer.Option("--workspace", "-w", help="Directory of runs and services (run.storage_path).")]


def register(app: typer.Typer) -> None:
    app.command()(run)
    app.command()(status)


def run(
    file: FileArgument,
    overrides: OverridesArgument = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Run in this process (inside a Ray job); Ctrl-C ends the run.")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Start and leave at once.")] = False,
) -> None:
    """Run a pipeline to its end. What is finished is skipped; Ctrl-C leaves it running."""
    from altiplano.pipeline.workspace import Workspace

    pipeline = load(file, overrides).pipeline
    if "RAY_JOB_ID" in os.environ and not Path(pipeline.run.storage_path).is_absolute():
        raise ValueError(
            "inside a Ray job run.storage_path must be absolute, on storage that every node sees, such as run.storage_path=/mnt/altiplano: "
            f"{pipeline.run.storage_path!r} would be thrown away with the job's working directory"
        )
    workspace = Workspace.of(pipeline.run)
    workspace.create()
    if foreground:
        raise typer.Exit(_in_this_process(pipeline, workspace))
    offset = workspace.events_file.stat().st_size if workspace.events_file.exists() else 0
    driver = _start_driver(pipeline, workspace)
    if detach:
        out.print(f"started; follow it with: altiplano status -w {workspace.root} --follow")
        return
    try:
        code = view.follow(workspace, offset, driver.poll)
    except KeyboardInterrupt:
        err.print()
        hint(
            f"The run goes on without you. Come back: altiplano status -w {workspace.root} --follow. Stop it: altiplano down -w {workspace.root}"
        )
        raise typer.Exit(130) from None
    raise typer.Exit(code)


def status(
    workspace: WorkspaceOption = Path(".altiplano"),
    name: Annotated[str | None, typer.Argument(help="Name of the run; default: the latest.", show_default=False)] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay until the run ends.")] = False,
    output: OutputOption = Output.text,
) -> None:
    """Show what a run has done and what it found."""
    from altiplano.pipeline.summary import latest_run, summarize

    place = latest_run(workspace.resolve(), name)
    if follow and place.is_running():
        try:
            raise typer.Exit(view.follow(place, view.start_of_run(place), lambda: None if place.is_running() else 1))
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
    summary = summarize(place)
    if output is Output.json:
        print_json(summary)
        return
    view.show(summary)


def _start_driver(pipeline: "spec.Pipeline", workspace: "Workspace") -> subprocess.Popen[str]:
    """A detached driver that holds the workspace's lock when this returns."""
    from altiplano.cluster.local_ray import environment
    from altiplano.cluster.processes import mark
    from altiplano.pipeline.workspace import READY

    with workspace.log_file.open("a") as log:
        driver = subprocess.Popen(
            DRIVER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=mark(workspace.root) | environment(workspace.root),
            start_new_session=True,
        )
    assert driver.stdin is not None and driver.stdout is not None
    with driver.stdin as stdin:
        stdin.write(json.dumps({"root": str(workspace.root), "pipeline": pipeline.model_dump(mode="json")}))
    answer = driver.stdout.readline().strip()
    if answer != READY:
        problem(answer or f"the driver did not start: see {workspace.log_file}")
        raise typer.Exit(driver.wait() or 1)
    return driver


def _in_this_process(pipeline: "spec.Pipeline", workspace: "Workspace") -> int:
    if "RAY_ADDRESS" not in os.environ:
        from altiplano.cluster.local_ray import environment

        os.environ.update(environment(workspace.root))
    from altiplano.pipeline import driver
    from altiplano.pipeline.events import EventLog

    narrator = view.Narrator(EventLog(workspace.events_file))
    with workspace.locked():
        code = driver.run(pipeline, workspace, narrator)
    return view.conclude(workspace, code, narrator.error)
