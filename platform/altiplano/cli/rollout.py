"""`altiplano rollout`: a challenger gets more traffic step by step, and is promoted or taken back by what its requests show."""

import getpass
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from altiplano.cli.console import Output, OutputOption, hint, out, print_json, table
from altiplano.cli.generate import ApiKeyOption, UrlOption
from altiplano.cli.runs import WorkspaceOption
from altiplano.client.endpoint import DEFAULT_URL

if TYPE_CHECKING:
    from altiplano.pipeline.rollouts import Site
    from altiplano.serve.rollout_store import Saved, Store

ModelOption = Annotated[str | None, typer.Option(help="Registered model; default: the champion's.", show_default=False)]
DashboardOption = Annotated[
    str | None, typer.Option(help="Ray's dashboard; default: the workspace's. Token: RAY_AUTH_TOKEN.", show_default=False)
]
TrackingOption = Annotated[str | None, typer.Option(help="MLflow; default: the workspace's server.", show_default=False)]
StepsOption = Annotated[str, typer.Option(help="Shares of the traffic in percent; 100 follows by promotion.")]
BakeOption = Annotated[float, typer.Option(min=0, help="Seconds at each step, at least.")]
MinRequestsOption = Annotated[int, typer.Option(min=1, help="Requests of the challenger at each step, at least.")]
ErrorsOption = Annotated[float, typer.Option(help="Largest growth of the share of failed requests.")]
TtftOption = Annotated[float, typer.Option(help="Largest ratio of the times to the first token.")]
SpeedOption = Annotated[float, typer.Option(help="Smallest ratio of tokens/s.")]
RatingOption = Annotated[float, typer.Option(help="Largest loss of the mean rating (-1 … 1).")]
PatienceOption = Annotated[
    float | None, typer.Option(help="A step that takes longer (seconds) is taken back; default: it waits.", show_default=False)
]
ShadowOption = Annotated[
    float, typer.Option(min=0, max=1, help="Share of the champion's answers given again by the challenger, unseen.")
]
BaseOption = Annotated[
    str | None,
    typer.Option(help="Where replicas find the challenger's base, when it is not the champion's.", show_default=False),
]
STEPS, LOG = "5,25,50", "controller.log"
NOT_PROMOTED = 3  # the code of a pipeline whose gate said no; its module would bring every stage

rollout = typer.Typer(help="Give a challenger traffic, and promote it or take it back.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(rollout, name="rollout")


@rollout.command()
def start(
    model: ModelOption = None,
    version: Annotated[int | None, typer.Option(help="Default: the alias `challenger`.", show_default=False)] = None,
    steps: StepsOption = STEPS,
    bake: BakeOption = 300.0,
    min_requests: MinRequestsOption = 200,
    max_error_increase: ErrorsOption = 0.02,
    max_ttft_ratio: TtftOption = 1.3,
    min_speed_ratio: SpeedOption = 0.75,
    max_rating_loss: RatingOption = 0.25,
    give_up_after: PatienceOption = None,
    shadow: ShadowOption = 0.0,
    base_model: BaseOption = None,
    override: Annotated[
        str | None, typer.Option(help="Why a version is rolled out that the gate has rejected.", show_default=False)
    ] = None,
    foreground: Annotated[bool, typer.Option("--foreground", help="Control it in this process until it ends.")] = False,
    workspace: WorkspaceOption = Path(".altiplano"),
    url: UrlOption = DEFAULT_URL,
    api_key: ApiKeyOption = None,
    dashboard_url: DashboardOption = None,
    tracking_uri: TrackingOption = None,
    output: OutputOption = Output.text,
) -> None:
    """Roll a version out. A controller of its own goes on when this command has ended."""
    from altiplano.pipeline.rollouts import plan

    settings = _settings(
        steps, bake, min_requests, max_error_increase, max_ttft_ratio, min_speed_ratio, max_rating_loss, give_up_after, shadow
    )
    site = _site(workspace, url, api_key, dashboard_url, tracking_uri)
    made = plan(site, model, version, settings, base_model, None if override is None else _signed(override))
    saved = site.store.begin(made, time.time())
    if foreground:
        _control(site, output)
        return
    _start_controller(site, workspace)
    _tell(saved, output)


@rollout.command()
def status(workspace: WorkspaceOption = Path(".altiplano"), output: OutputOption = Output.text) -> None:
    """Show where the rollout is, why, and what it has seen."""
    _tell(_saved(_store(workspace)), output)


@rollout.command()
def pause(workspace: WorkspaceOption = Path(".altiplano")) -> None:
    """Keep the weights as they are. A broken budget still takes the challenger back."""
    _ask("pause", workspace)


@rollout.command()
def resume(workspace: WorkspaceOption = Path(".altiplano")) -> None:
    """Go on after a pause."""
    _ask("resume", workspace)


@rollout.command()
def promote(
    override: Annotated[str | None, typer.Option(help="Why now, though not all budgets look kept.", show_default=False)] = None,
    workspace: WorkspaceOption = Path(".altiplano"),
) -> None:
    """Make the challenger the champion now. Against the evidence only with a reason, which is recorded with your name."""
    from altiplano.serve.rollout import doubts

    saved = _saved(_store(workspace))
    against = "; ".join(doubts(saved.plan, saved.notebook.outcomes()))
    if against and override is None:
        raise ValueError(f"not all budgets look kept ({against}): wait, or say why it has to be now with --override REASON")
    who = getpass.getuser()
    reason = f"promoted by {who}" if override is None else f"promoted by {_signed(override)}"
    _ask("promote", workspace, f"{reason} (against: {against})" if against else reason)


@rollout.command()
def rollback(workspace: WorkspaceOption = Path(".altiplano")) -> None:
    """Give all traffic back to the champion now."""
    _ask("rollback", workspace)


@rollout.command()
def control(
    workspace: WorkspaceOption = Path(".altiplano"),
    url: UrlOption = DEFAULT_URL,
    api_key: ApiKeyOption = None,
    dashboard_url: DashboardOption = None,
    tracking_uri: TrackingOption = None,
    output: OutputOption = Output.text,
) -> None:
    """Go on with a rollout whose controller has ended (a machine that went down, a pod that was moved)."""
    _control(_site(workspace, url, api_key, dashboard_url, tracking_uri), output)


@rollout.command()
def watch(
    model: Annotated[str, typer.Argument(help="Registered model.")],
    interval: Annotated[float, typer.Option(min=0.5, help="Seconds between two looks at the registry.")] = 10.0,
    steps: StepsOption = STEPS,
    bake: BakeOption = 300.0,
    min_requests: MinRequestsOption = 200,
    max_error_increase: ErrorsOption = 0.02,
    max_ttft_ratio: TtftOption = 1.3,
    min_speed_ratio: SpeedOption = 0.75,
    max_rating_loss: RatingOption = 0.25,
    give_up_after: PatienceOption = None,
    shadow: ShadowOption = 0.0,
    workspace: WorkspaceOption = Path(".altiplano"),
    url: UrlOption = DEFAULT_URL,
    api_key: ApiKeyOption = None,
    dashboard_url: DashboardOption = None,
    tracking_uri: TrackingOption = None,
) -> None:
    """Start a rollout whenever the alias `challenger` moves, and control it. Runs until it is stopped."""
    from altiplano.pipeline.rollouts import Watcher

    settings = _settings(
        steps, bake, min_requests, max_error_increase, max_ttft_ratio, min_speed_ratio, max_rating_loss, give_up_after, shadow
    )
    site = _site(workspace, url, api_key, dashboard_url, tracking_uri)
    Watcher(site, model, settings, hint).run(interval, threading.Event())


def _settings(
    steps: str,
    bake: float,
    min_requests: int,
    errors: float,
    ttft: float,
    speed: float,
    rating: float,
    patience: float | None,
    shadow: float,
) -> dict[str, Any]:
    """A plan's fields from the options."""
    from altiplano.serve.rollout import Budgets

    try:
        shares = tuple(float(step) for step in steps.split(","))
    except ValueError:
        raise ValueError(f"--steps {steps!r} is no list of shares: write percents with commas, such as 5,25,50") from None
    return {
        "steps": shares,
        "bake_s": bake,
        "min_requests": min_requests,
        "give_up_after_s": patience,
        "shadow": shadow,
        "budgets": Budgets(errors, ttft, speed, rating),
    }


def _site(workspace: Path, url: str, api_key: str | None, dashboard_url: str | None, tracking_uri: str | None) -> "Site":
    from altiplano.pipeline.rollouts import Site

    return Site.find(workspace.resolve(), url, api_key=api_key, dashboard_url=dashboard_url, tracking_uri=tracking_uri)


def _store(workspace: Path) -> "Store":
    from altiplano.serve.rollout_store import Store

    return Store(workspace.resolve() / "rollout")


def _saved(store: "Store") -> "Saved":
    from altiplano.serve.rollout_store import NoRolloutError

    saved = store.load()
    if saved is None:
        raise NoRolloutError(f"there was no rollout in {store.directory}: start one with `altiplano rollout start`")
    return saved


def _control(site: "Site", output: Output) -> None:
    """Until it has ended; leaves as a pipeline does whose gate said no when the challenger was taken back."""
    from altiplano.pipeline.rollouts import controller
    from altiplano.serve.rollout import Phase
    from altiplano.serve.rollout_store import RolloutBusyError

    # MLflow says where a run is seen, on standard output, which is for results.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    with site.store.controlled() as alone:
        if not alone:
            raise RolloutBusyError("another controller carries this rollout out already: see `altiplano rollout status`")
        state = controller(site).run(threading.Event())
    _tell(_saved(site.store), output)
    if state.phase is Phase.rolled_back:
        raise typer.Exit(NOT_PROMOTED)


def _start_controller(site: "Site", workspace: Path) -> None:
    """`altiplano rollout control` as a process of the workspace, which goes on without this one."""
    from altiplano.cluster.local_ray import environment
    from altiplano.cluster.processes import mark

    root = workspace.resolve()
    secrets = {"ALTIPLANO_API_KEY": site.api_key, "RAY_AUTH_TOKEN": site.ray_token}  # not where `ps` shows them
    places = ["--url", site.url, "--dashboard-url", site.dashboard_url, "--tracking-uri", site.tracking_uri]
    with (site.directory / LOG).open("a") as log:
        subprocess.Popen(
            [sys.executable, "-m", "altiplano.cli", "rollout", "control", "-w", str(root), *places],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=mark(root) | environment(root) | {name: value for name, value in secrets.items() if value},
            start_new_session=True,
        )


def _signed(reason: str) -> str:
    """Who says so, and why.

    Raises:
        ValueError: nothing is said.
    """
    if not reason.strip():
        raise ValueError("--override needs a reason: write one sentence")
    return f"{getpass.getuser()}: {reason.strip()}"


def _ask(verb: str, workspace: Path, reason: str = "") -> None:
    store = _store(workspace)
    store.ask(verb, reason)
    with store.controlled() as nobody:
        lost = nobody
    if lost:
        hint("no controller is running: `altiplano rollout control` carries it out")
    out.print(f"asked for: {verb}; see `altiplano rollout status`", markup=False)


def _tell(saved: "Saved", output: Output) -> None:
    if output is Output.json:
        print_json(saved.to_json())
        return
    plan, state = saved.plan, saved.state
    from altiplano.serve.rollout import judge, share

    phase = state.phase.replace("_", " ")
    out.print(f"{plan.challenger} against {plan.champion}: {phase}, {share(plan, state):g} % of the traffic", markup=False)
    out.print(f"{state.reason}", markup=False)
    if plan.apart is not None:
        out.print(f"its base is {plan.apart['model']}, so it has a deployment of its own", markup=False)
    moves = [
        [time.strftime("%H:%M:%S", time.localtime(m["time"])), m["phase"], f"{m['share']:g} %", m["reason"]]
        for m in saved.history
    ]
    out.print(table("", ["time", "phase", ">share", "why"], moves))
    checks = judge(plan, saved.notebook.outcomes())
    out.print(table("", ["budget", "state", "detail"], [[check.name, check.mark, check.detail] for check in checks]))
