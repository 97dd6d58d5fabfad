"""`altiplano jobs`: work for the cluster. On the standing one through Ray's job API, or as a RayJob with a cluster of its own."""

import shlex
import sys
import time
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from altiplano.cli.console import Output, OutputOption, err, hint, out, print_json, table
from altiplano.cli.job_places import JobPlaces
from altiplano.cli.plans import (
    RELEASE,
    UNITS,
    ContextOption,
    DryRunOption,
    NamespaceOption,
    ReleaseOption,
    YesOption,
    agreed,
    seconds_of,
)

if TYPE_CHECKING:
    from altiplano.cluster.jobs import Job
    from altiplano.cluster.kube import Object
    from altiplano.cluster.rayjob import JobWish


class Target(StrEnum):
    """Where a job runs."""

    cluster = "cluster"
    rayjob = "rayjob"


DashboardOption = Annotated[
    str | None,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS",
        help="Ray's dashboard, instead of finding it through Kubernetes. Token: RAY_AUTH_TOKEN, or ~/.ray/auth_token.",
        show_default=False,
    ),
]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="As `altiplano jobs list` shows it.")]
FollowOption = Annotated[
    bool, typer.Option("--follow/--no-follow", "-f", help="Print until the job ends, and end with its code.")
]
FAILED = 1

jobs = typer.Typer(help="Submit, list, follow and stop jobs on a cluster.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(jobs, name="jobs")


@jobs.command()
def submit(
    entrypoint: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="What to run.", show_default=False)],
    to: Annotated[
        Target, typer.Option(help="cluster: the standing one; rayjob: one of its own, which goes when the job ends.")
    ] = (Target.cluster),
    name: Annotated[str | None, typer.Option(help="Default: made from the time.", show_default=False)] = None,
    working_dir: Annotated[
        str | None,
        typer.Option(help="Directory to send (what git knows of it); for a RayJob an address of a zip.", show_default=False),
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option("--env", "-e", metavar="KEY=VALUE", help="Environment of the job.", show_default=False)
    ] = None,
    num_cpus: Annotated[
        float | None, typer.Option(min=0, help="CPUs that the command itself asks for.", show_default=False)
    ] = None,
    num_gpus: Annotated[
        float | None, typer.Option(min=0, help="GPUs that the command itself asks for.", show_default=False)
    ] = None,
    resource: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=COUNT", help="Other resources of it, such as training=0.01.", show_default=False),
    ] = None,
    workers: Annotated[
        list[str] | None,
        typer.Option(metavar="GROUP=COUNT", help="RayJob: pods to start with; the autoscaler adds more.", show_default=False),
    ] = None,
    keep_for: Annotated[str, typer.Option(help="RayJob: how long its cluster and log stay after the end: 30s, 10m, 2h.")] = "10m",
    deadline: Annotated[str | None, typer.Option(help="RayJob: stopped after this long: 12h, 2d.", show_default=False)] = None,
    retries: Annotated[int, typer.Option(min=0, help="RayJob: new attempts, each in a new cluster.")] = 0,
    queue: Annotated[str | None, typer.Option(help="RayJob: queue of Kueue.", show_default=False)] = None,
    follow: FollowOption = False,
    context: ContextOption = None,
    namespace: NamespaceOption = None,
    release: ReleaseOption = RELEASE,
    dashboard_url: DashboardOption = None,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    output: OutputOption = Output.text,
) -> None:
    """Start a job and print its id."""
    places = JobPlaces(context, namespace, release, dashboard_url)
    made = name or f"job-{time.strftime('%m%d-%H%M%S')}"
    command = shlex.join(entrypoint)
    variables, amounts = (
        _pairs("--env", env),
        {key: _number("--resource", value) for key, value in _pairs("--resource", resource).items()},
    )
    if to is Target.rayjob:
        from altiplano.cluster.rayjob import JobWish

        if dashboard_url is not None or num_cpus is not None or num_gpus is not None or amounts:
            raise ValueError(
                "--dashboard-url, --num-cpus, --num-gpus and --resource are for --to cluster: size a RayJob with --workers"
            )
        wish = JobWish(
            made,
            command,
            {key: int(_number("--workers", value)) for key, value in _pairs("--workers", workers).items()},
            variables,
            working_dir,
            seconds_of("--keep-for", keep_for),
            None if deadline is None else seconds_of("--deadline", deadline),
            retries,
            queue,
        )
        started = _submit_ray_job(wish, places, dry_run=dry_run, yes=yes, output=output)
    else:
        if workers or deadline is not None or retries or queue is not None:
            raise ValueError("--workers, --deadline, --retries and --queue are for --to rayjob")
        folder = None if working_dir is None else Path(working_dir)
        with places.standing() as ray_jobs:
            if dry_run:
                _tell_upload(folder, command, ray_jobs.list(), output)
                return
            ray_jobs.submit(
                command,
                working_dir=folder,
                env=variables,
                submission_id=made,
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                resources=amounts,
            )
            started = True
    if not started:
        return
    if output is Output.json:
        print_json({"id": made, "to": str(to), "entrypoint": command})
    else:
        out.print(made, markup=False)
    if follow:
        _follow(made, places)
    elif output is Output.text:
        hint(f"follow it: altiplano jobs logs -f {made}")


@jobs.command(name="list")
def list_jobs(
    context: ContextOption = None,
    namespace: NamespaceOption = None,
    release: ReleaseOption = RELEASE,
    dashboard_url: DashboardOption = None,
    output: OutputOption = Output.text,
) -> None:
    """List jobs of the standing cluster, and RayJobs."""
    rows, problems = _all_jobs(JobPlaces(context, namespace, release, dashboard_url))
    if output is Output.json:
        print_json({"jobs": rows, "problems": problems})
    else:
        now = time.time()
        columns = ["ID", "WHERE", "STATUS", ">AGE", "COMMAND"]
        out.print(
            table("", columns, [[r["id"], r["where"], r["status"], _age(r["started"], now), r["entrypoint"]] for r in rows])
            if rows
            else "no jobs"
        )
    for problem in problems:
        hint(problem)
    if problems and not rows:
        raise typer.Exit(4)


@jobs.command()
def logs(
    job_id: IdArgument,
    follow: FollowOption = False,
    context: ContextOption = None,
    namespace: NamespaceOption = None,
    release: ReleaseOption = RELEASE,
    dashboard_url: DashboardOption = None,
) -> None:
    """Print what a job has printed."""
    places = JobPlaces(context, namespace, release, dashboard_url)
    if follow:
        _follow(job_id, places)
        return
    with places.cluster_of(job_id) as (ray_jobs, submission):
        sys.stdout.write(ray_jobs.log(submission))


@jobs.command()
def stop(
    job_id: IdArgument,
    context: ContextOption = None,
    namespace: NamespaceOption = None,
    release: ReleaseOption = RELEASE,
    dashboard_url: DashboardOption = None,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
) -> None:
    """Stop a job. A RayJob whose cluster is not up yet is deleted."""
    places = JobPlaces(context, namespace, release, dashboard_url)
    if places.is_waiting(job_id):
        err.print(f"RayJob {job_id} has no running cluster: it is deleted, with what was started for it", markup=False)
        if agreed("Delete it?", dry_run=dry_run, yes=yes):
            places.delete(job_id)
            out.print(f"deleted {job_id}", markup=False)
        return
    with places.cluster_of(job_id) as (ray_jobs, submission):
        job = ray_jobs.get(submission)
        err.print(f"{job_id} is {job.status}: {job.entrypoint}", markup=False)
        if not agreed("Stop it?", dry_run=dry_run, yes=yes):
            return
        stopped = ray_jobs.stop(submission)
    out.print(f"stopping {job_id}; its checkpoints stay" if stopped else f"{job_id} had ended", markup=False)


def _follow(job_id: str, places: JobPlaces) -> None:
    """Print until the job ends; leave with its exit code."""
    with places.cluster_of(job_id) as (ray_jobs, submission):
        try:
            for piece in ray_jobs.follow(submission):
                sys.stdout.write(piece)
                sys.stdout.flush()
        except KeyboardInterrupt:
            hint(f"the job goes on: altiplano jobs logs -f {job_id}, altiplano jobs stop {job_id}")
            raise typer.Exit(130) from None
        job = ray_jobs.wait(submission, timeout_s=30)
    if job.status != "SUCCEEDED":
        hint(f"{job_id} {job.status}: {job.message}")
    raise typer.Exit(_code(job))


def _code(job: "Job") -> int:
    """That of the command; 1 where Ray knows none."""
    return 0 if job.status == "SUCCEEDED" else job.exit_code or FAILED


def _submit_ray_job(wish: "JobWish", places: JobPlaces, *, dry_run: bool, yes: bool, output: Output) -> bool:
    from altiplano.cluster.kube import RAY_JOB
    from altiplano.cluster.rayjob import gpus_of, ray_job

    found = places.release
    manifest = ray_job(found.jobs_cluster(), wish)
    # The server's own checks, before anybody is asked.
    found.kube.create(RAY_JOB, manifest, dry_run=True)
    if dry_run and output is Output.json:
        print_json(manifest)
    first, most = gpus_of(manifest)
    counts = ", ".join(f"{count} of {group}" for group, count in wish.workers.items()) or "no workers until it asks for them"
    err.print(
        f"RayJob {wish.name} in namespace {found.kube.namespace}: a new cluster with a head and {counts}; GPUs {first}"
        + (f", at most {most}" if most > first else "")
        + f"; it goes {wish.keep_for_s} s after the end",
        markup=False,
    )
    if not agreed("Start it?", dry_run=dry_run, yes=yes):
        return False
    found.kube.create(RAY_JOB, manifest)
    return True


def _all_jobs(places: JobPlaces) -> tuple[list[dict[str, Any]], list[str]]:
    """Jobs of both kinds, the newest first, and what could not be asked."""
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    if places.on_kubernetes:
        from altiplano.cluster.kube import RAY_JOB

        rows += [_row_of_ray_job(manifest) for manifest in places.release.kube.find(RAY_JOB)]
    try:
        with places.standing() as ray_jobs:
            rows += [_row(job) for job in ray_jobs.list()]
    except (ConnectionError, ValueError) as error:
        if not places.on_kubernetes:
            raise
        problems.append(str(error))
    return sorted(rows, key=lambda row: row["started"] or float("inf"), reverse=True), problems


def _row(job: "Job") -> dict[str, Any]:
    return {
        "id": job.id,
        "where": "cluster",
        "status": job.status,
        "started": job.started,
        "ended": job.ended,
        "entrypoint": job.entrypoint,
        "message": job.message,
    }


def _row_of_ray_job(manifest: "Object") -> dict[str, Any]:
    status = manifest.get("status", {})

    def seconds(text: str | None) -> float | None:
        return None if text is None else datetime.fromisoformat(text).astimezone(UTC).timestamp()

    return {
        "id": manifest["metadata"]["name"],
        "where": "rayjob",
        "status": status.get("jobStatus") or status.get("jobDeploymentStatus") or "NEW",
        "started": seconds(status.get("startTime") or manifest["metadata"].get("creationTimestamp")),
        "ended": seconds(status.get("endTime")),
        "entrypoint": manifest["spec"].get("entrypoint", ""),
        "message": status.get("message", ""),
    }


def _tell_upload(folder: Path | None, command: str, present: "list[Job]", output: Output) -> None:
    """What a submit would send."""
    from altiplano.cluster.jobs_package import Package

    package = None if folder is None else Package.of(folder)
    if output is Output.json:
        size = len(package.data) if package else 0
        print_json({"entrypoint": command, "upload_bytes": size, "jobs_running": sum(j.status == "RUNNING" for j in present)})
        return
    sent = f"sends {len(package.data) / 1024:,.0f} KiB of {folder}" if package else "sends nothing"
    running = sum(job.status == "RUNNING" for job in present)
    err.print(f"runs {command!r} on the standing cluster, where {running} jobs run; {sent}", markup=False)
    hint("dry run: nothing was changed")


def _age(started: float | None, now: float) -> str:
    if started is None:
        return "-"
    seconds = max(0, int(now - started))
    return next((f"{seconds // length}{unit}" for unit, length in reversed(UNITS.items()) if seconds >= length), "0s")


def _pairs(option: str, given: list[str] | None) -> dict[str, str]:
    pairs = {}
    for entry in given or []:
        key, equals, value = entry.partition("=")
        if not (key and equals):
            raise ValueError(f"{option} {entry!r} has no value: write KEY=VALUE")
        pairs[key] = value
    return pairs


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{option}: {text!r} is not a number") from None
