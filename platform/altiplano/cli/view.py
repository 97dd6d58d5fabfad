"""A run as a person sees it: one line per finished stage, the living stage below, the result as the last screen."""

import time
from collections.abc import Callable
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from altiplano.cli.console import err, out, problem, table
from altiplano.pipeline.events import Event, EventLog, read
from altiplano.pipeline.workspace import Workspace

POLL_S = 0.1


def follow(workspace: Workspace, offset: int, driver_code: Callable[[], int | None]) -> int:
    """Show events from byte `offset` on until the run ends; returns its exit code.

    `driver_code` tells whether the driver has ended (its exit code) or is alive (None): a driver that was killed writes no
    last event.
    """
    screen = Screen()
    with Live(screen, console=err, refresh_per_second=8, transient=True) if err.is_terminal else _Plain() as live:
        while True:
            ended = driver_code()
            events, offset = read(workspace.events_file, offset)
            for event in events:
                for line in screen.take(event):
                    (live.console if isinstance(live, Live) else err).print(line)
                if event["kind"] == "run_finished":
                    break
            if screen.code is not None or ended is not None:
                break
            time.sleep(POLL_S)
    if screen.code is None and workspace.is_full():
        from altiplano.pipeline.outcome import NO_SPACE

        problem(workspace.no_space)
        return NO_SPACE
    if screen.code is None:
        problem(
            f"the driver ended without a word (exit code {ended}): see {workspace.log_file}; run the same command again to go on"
        )
        return 1
    return conclude(workspace, screen.code, screen.error)


def conclude(workspace: Workspace, code: int, error: str | None) -> int:
    """Print the last screen of a run."""
    from altiplano.pipeline.summary import summarize

    if error is not None:
        problem(error)
        err.print(f"details: {workspace.log_file}", style="dim")
    else:
        show(summarize(workspace))
    return code


def start_of_run(workspace: Workspace) -> int:
    """Byte offset of the latest run_started event."""
    data = workspace.events_file.read_bytes()
    return max(0, data.rfind(b'{"kind": "run_started"'))


class Screen:
    """Folds events into finished lines and the picture of the living stage."""

    def __init__(self) -> None:
        self.code: int | None = None
        self.error: str | None = None
        self._stage: str | None = None
        self._text = ""
        self._trials: list[dict[str, Any]] = []
        self._spinner = Spinner("dots")

    def take(self, event: Event) -> list[RenderableType]:
        """Take one event in; returns lines to print for good."""
        kind, stage = event["kind"], event.get("stage", "")
        if kind == "stage_started":
            self._stage, self._text, self._trials = stage, "", []
            return [] if err.is_terminal else [Text(f"… {stage}")]
        if kind == "progress":
            fresh = event["text"] != self._text
            self._stage, self._text, self._trials = stage, event["text"], event.get("trials", self._trials)
            return [Text(f"  {stage}: {self._text}")] if fresh and not err.is_terminal else []
        if kind in ("stage_finished", "stage_skipped"):
            took = f"{event['seconds']:.0f} s" if kind == "stage_finished" else "already done"
            lines: list[RenderableType] = [
                Text.assemble(("✓ ", "green"), (f"{stage:<9}", "bold"), event["summary"], (f"  ({took})", "dim"))
            ]
            if self._trials:
                lines.append(trials_table(self._trials))
            self._stage, self._text, self._trials = None, "", []
            return lines
        if kind == "stage_failed":
            return [Text.assemble(("✗ ", "red"), (f"{stage:<9}", "bold"), event["error"])]
        if kind == "run_finished":
            self.code, self.error, self._stage = event["code"], event.get("error"), None
        return []

    def __rich__(self) -> RenderableType:
        if self._stage is None:
            return Text("")
        self._spinner.update(text=Text.assemble((f"{self._stage:<9}", "bold"), self._text))
        return Group(self._spinner, trials_table(self._trials)) if self._trials else self._spinner


class _Plain:
    """Stands in for Live where there is no terminal: lines only."""

    def __enter__(self) -> "_Plain":
        return self

    def __exit__(self, *error: object) -> None:
        return None


class Narrator(EventLog):
    """An event log that also tells its events as plain lines: for runs in the foreground, such as Ray jobs."""

    def __init__(self, log: EventLog) -> None:
        self._log, self._screen = log, Screen()

    @property
    def error(self) -> str | None:
        """Why the run ended, if not by itself."""
        return self._screen.error

    def emit(self, kind: str, **fields: Any) -> None:
        self._log.emit(kind, **fields)
        for line in self._screen.take({"kind": kind, **fields}):
            err.print(line)

    def close(self) -> None:
        self._log.close()


def trials_table(trials: list[dict[str, Any]]) -> RenderableType:
    """One row per trial, the best first; the names of parameters are those of the pipeline file."""
    names = list(trials[0]["params"]) if trials else []
    ranked = sorted(trials, key=lambda t: (t["metric"] is None, t["metric"] or 0.0))
    rows = [
        [t["id"], *(_number(t["params"].get(n)) for n in names), f"{t['tokens']:,}", _number(t["metric"]), t["status"]]
        for t in ranked
    ]
    return table("", ["trial", *(f">{n}" for n in names), ">tokens", ">eval loss", "status"], rows)


def show(summary: dict[str, Any]) -> None:
    """The last screen."""
    out.print()
    if summary.get("trials"):
        out.print(trials_table(summary["trials"]))
        out.print()
    for label, value in summary["lines"]:
        out.print(Text.assemble((f"{label:<14}", "bold"), value))
    chat = summary.get("chat")
    if chat:
        out.print()
        out.print(Text.assemble(("you        ", "cyan"), chat["question"]))
        out.print(Text.assemble((f"{chat['model']:<11}", "green"), chat["answer"]))


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
