"""`altiplano cluster`: a release of the chart on Kubernetes: install or change it, look at it, find out what is wrong."""

import shlex
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from altiplano.cli.console import Output, OutputOption, err, hint, out, print_json, table
from altiplano.cli.plans import (
    RELEASE,
    ContextOption,
    DryRunOption,
    NamespaceOption,
    ReleaseOption,
    YesOption,
    agreed,
    release_of,
    show,
    to_json,
)

if TYPE_CHECKING:
    from altiplano.cluster.kube import Kube, Object

TAIL = 100
# Component of the chart, or the operator; the container that has something to say.
COMPONENTS = {
    "jobs": None,
    "endpoint": None,
    "mlflow": None,
    "postgres": None,
    "redis": None,
    "autoscaler": "autoscaler",
    "operator": None,
}

cluster = typer.Typer(help="Install the chart on Kubernetes, and look after it.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(cluster, name="cluster")


@cluster.command()
def install(
    values: Annotated[
        list[Path] | None, typer.Option("--values", "-f", help="Values file; may be repeated.", show_default=False)
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One value; may be repeated.", show_default=False)
    ] = None,
    chart: Annotated[
        str | None, typer.Option(help="Directory, .tgz or oci:// of the chart; default: the checkout's.", show_default=False)
    ] = None,
    helm: Annotated[str, typer.Option(help="Helm 3 or 4.")] = "helm",
    operator: Annotated[bool, typer.Option("--operator", help="Install KubeRay's operator first, where there is none.")] = False,
    operator_version: Annotated[str, typer.Option(help="Of KubeRay.")] = "1.7.0",
    timeout: Annotated[str, typer.Option(help="Of helm, for hooks.")] = "10m",
    context: ContextOption = None,
    namespace: NamespaceOption = None,
    release: ReleaseOption = RELEASE,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    output: OutputOption = Output.text,
) -> None:
    """Install the chart, or change what is installed. Shows what changes in place, what rolls, what restarts, and the command."""
    from altiplano.cluster.helm import Helm, chart_place

    kube = release_of(context, namespace, release).kube
    driven = Helm.find(helm, release=release, namespace=kube.namespace, context=context, values=values or (), sets=sets or ())
    place = chart_place(chart)
    commands = [driven.operator_command(operator_version, "kuberay")] if operator and not _has_operator(kube) else []
    if not commands and not kube.kinds("ray.io/v1"):
        raise ValueError(
            "this cluster does not know KubeRay's kinds: add --operator, or install it as step 1 of docs/install.md says"
        )
    driven.build_dependencies(place)
    plans = driven.plan(place, kube.version())
    # Not for a namespace that is there: who may only work in it may not make one.
    commands.append([*driven.upgrade_command(place, timeout), *([] if kube.has_namespace() else ["--create-namespace"])])
    if output is Output.json:
        print_json({"commands": commands, "changes": to_json(plans)})
    else:
        show(plans)
        if not plans:
            out.print("nothing would change")
        for command in commands:
            out.print(f"$ {shlex.join(command)}", markup=False)
    if agreed("Run this?", dry_run=dry_run, yes=yes):
        for command in commands:
            driven.run(command)
        hint("is it up? altiplano cluster status, altiplano cluster doctor")


@cluster.command()
def status(
    context: ContextOption = None,
    namespace: NamespaceOption = None,
    release: ReleaseOption = RELEASE,
    output: OutputOption = Output.text,
) -> None:
    """Show operator, Ray clusters with their groups, endpoint, MLflow, databases, volumes and GPUs."""
    from altiplano.cluster.status import status as look

    lines = look(release_of(context, namespace, release))
    if output is Output.json:
        print_json([asdict(line) for line in lines])
        return
    out.print(table("", ["PART", "STATE", "DETAIL"], [[line.part, line.state, line.detail] for line in lines]))


@cluster.command()
def doctor(
    context: ContextOption = None,
    namespace: NamespaceOption = None,
    release: ReleaseOption = RELEASE,
    output: OutputOption = Output.text,
) -> None:
    """Find out why something does not run, and what to do. Exit code 1 when something is broken."""
    from altiplano.cluster.doctor import Verdict, examine

    checks = examine(release_of(context, namespace, release), datetime.now(UTC))
    if output is Output.json:
        print_json([asdict(check) for check in checks])
    else:
        marks = {Verdict.ok: "ok", Verdict.warn: "..", Verdict.fail: "!!"}
        out.print(table("", ["", "CHECK", "DETAIL"], [[marks[c.verdict], c.name, c.detail] for c in checks]))
        for check in checks:
            if check.verdict is not Verdict.ok:
                out.print(f"{marks[check.verdict]} {check.name}: {check.advice}", markup=False)
    if any(check.verdict is Verdict.fail for check in checks):
        raise typer.Exit(1)


@cluster.command()
def logs(
    component: Annotated[str, typer.Argument(help=f"One of {', '.join(COMPONENTS)}.")],
    pod: Annotated[str | None, typer.Option(help="Only this pod.", show_default=False)] = None,
    tail: Annotated[int, typer.Option(min=0, help="Lines of each pod to begin with.")] = TAIL,
    follow: Annotated[bool, typer.Option("--follow", help="Stay, for one pod.")] = False,
    context: ContextOption = None,
    namespace: NamespaceOption = None,
    release: ReleaseOption = RELEASE,
) -> None:
    """Print what the pods of a component say."""
    from altiplano.cluster.kube import Kube

    if component not in COMPONENTS:
        raise ValueError(f"{component!r} is no component: choose one of {', '.join(COMPONENTS)}")
    found = release_of(context, namespace, release)
    pods = _pods_of(found.kube, component, found.labels("jobs" if component == "autoscaler" else component))
    pods = [one for one in pods if pod in (None, one["metadata"]["name"])]
    if not pods:
        raise ValueError(
            f"no pod of {component} in release {release}, namespace {found.kube.namespace}: `altiplano cluster status` shows what there is"
        )
    kube = found.kube if component != "operator" else Kube(found.kube.api, pods[0]["metadata"]["namespace"])
    if follow and len(pods) > 1:
        raise ValueError(f"--follow takes one pod, name it with --pod: {', '.join(one['metadata']['name'] for one in pods)}")
    for one in pods:
        name, container = one["metadata"]["name"], COMPONENTS[component] or one["spec"]["containers"][0]["name"]
        if follow:
            _follow(kube, name, container, tail)
        else:
            err.print(f"--- {name}", style="dim", markup=False)
            sys.stdout.write(kube.pod_log(name, container, tail))


def _has_operator(kube: "Kube") -> bool:
    from altiplano.cluster.kube import DEPLOYMENT
    from altiplano.cluster.status import OPERATOR

    return bool(kube.find(DEPLOYMENT, OPERATOR, everywhere=True))


def _pods_of(kube: "Kube", component: str, labels: dict[str, str]) -> "list[Object]":
    """Running pods of a component, heads of Ray clusters first."""
    from altiplano.cluster.kube import POD
    from altiplano.cluster.status import OPERATOR

    found = kube.find(POD, OPERATOR, everywhere=True) if component == "operator" else kube.find(POD, labels)
    started = [one for one in found if one.get("status", {}).get("phase") != "Pending"]
    if component == "autoscaler":
        started = [one for one in started if one["metadata"]["labels"].get("ray.io/node-type") == "head"]
    return sorted(started, key=lambda one: (one["metadata"]["labels"].get("ray.io/node-type") != "head", one["metadata"]["name"]))


def _follow(kube: "Kube", pod: str, container: str, tail: int) -> None:
    try:
        for piece in kube.follow_pod_log(pod, container, tail):
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
