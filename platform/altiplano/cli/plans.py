"""What the commands for Kubernetes share: which release they mean, and a plan that is shown before anything is applied."""

import re
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from altiplano.cli.console import err, out, table

if TYPE_CHECKING:
    from altiplano.cluster.diff import Plan
    from altiplano.cluster.kube_release import Release

ContextOption = Annotated[
    str | None, typer.Option(help="Context of the kubeconfig; default: the current one.", show_default=False)
]
NamespaceOption = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Default: the context's namespace.", show_default=False)
]
ReleaseOption = Annotated[str, typer.Option("--release", help="Name of the Helm release.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show the plan and leave.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Apply without asking.")]
RELEASE = "altiplano"
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
SHOWN = 60


def release_of(context: str | None, namespace: str | None, name: str) -> "Release":
    """Raises KubeconfigError: there is no cluster to talk to."""
    from altiplano.cluster.kube import Kube
    from altiplano.cluster.kube_release import Release

    return Release(Kube.connect(context, namespace), name)


def agreed(question: str, *, dry_run: bool, yes: bool) -> bool:
    """Whether to go on after a plan was shown.

    Raises:
        ValueError: nobody is there to answer.
    """
    if dry_run:
        err.print("dry run: nothing was changed", style="dim")
        return False
    if yes:
        return True
    if not sys.stdin.isatty():
        raise ValueError("nobody can answer here: look at the plan with --dry-run, apply it with -y")
    return typer.confirm(question, err=True)


def show(plans: "list[Plan]") -> None:
    """The changes, grouped by what they do to what runs, the mildest first."""
    from altiplano.cluster.diff import MEANING, Effect

    for effect in Effect:
        found = [(plan, change) for plan in plans for change in plan.changes if change.effect is effect]
        if not found:
            continue
        out.print(f"{effect}: {MEANING[effect]}", style="bold", markup=False)
        rows = [
            [f"  {plan.kind} {plan.name}", change.path or "-", _short(change.before), _short(change.after)]
            for plan, change in found
        ]
        out.print(table("", ["  object", "field", "now", "then"], rows))


def to_json(plans: "list[Plan]") -> list[dict[str, Any]]:
    """The same for programs."""
    return [
        {
            "kind": plan.kind,
            "name": plan.name,
            "changes": [{"path": c.path, "before": c.before, "after": c.after, "effect": str(c.effect)} for c in plan.changes],
        }
        for plan in plans
    ]


def seconds_of(option: str, text: str) -> int:
    """
    Raises:
        ValueError: the text is not a time as in 30m.
    """
    found = re.fullmatch(r"([1-9]\d{0,5})([smhd])", text)
    if found is None:
        raise ValueError(f"{option} {text!r} is not a time: write a number and s, m, h or d, for example 30m")
    return int(found[1]) * UNITS[found[2]]


def _short(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
