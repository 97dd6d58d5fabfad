"""`altiplano deploy`: the endpoint on Kubernetes gets the model of a pipeline file, in the version behind a registry alias."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from altiplano.cli.console import Output, OutputOption, err, hint, out, print_json
from altiplano.cli.files import FileArgument, OverridesArgument, load
from altiplano.cli.plans import (
    RELEASE,
    ContextOption,
    DryRunOption,
    NamespaceOption,
    ReleaseOption,
    YesOption,
    agreed,
    release_of,
    seconds_of,
    show,
    to_json,
)

if TYPE_CHECKING:
    from altiplano import spec
    from altiplano.cluster.kube import Object
    from altiplano.cluster.kube_release import Release
    from altiplano.serve.control import RefusedConfigError

FETCH_TIMEOUT_S = 600.0


def register(app: typer.Typer) -> None:
    app.command()(deploy)


def deploy(
    file: FileArgument,
    overrides: OverridesArgument = None,
    alias: Annotated[str, typer.Option(help="Alias of the registry, and of the endpoint.")] = "champion",
    version: Annotated[int | None, typer.Option(help="This version instead of the alias's.", show_default=False)] = None,
    keep_settings: Annotated[
        bool,
        typer.Option("--keep-settings", help="Change adapter and alias only, in place; not what the file says of the engine."),
    ] = False,
    directory: Annotated[Path, typer.Option(help="Where the adapter goes: a volume that jobs and endpoint see.")] = Path(
        "/workspace/adapters"
    ),
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow as pods reach it; default: the release's own.", show_default=False)
    ] = None,
    context: ContextOption = None,
    namespace: NamespaceOption = None,
    release: ReleaseOption = RELEASE,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Leave when every replica has taken it; an error when one does not.")
    ] = False,
    timeout: Annotated[str, typer.Option(help="Of --wait: 30s, 10m, 2h.")] = "10m",
    output: OutputOption = Output.text,
) -> None:
    """Render the RayService from a pipeline file and the registry, show what would change, and apply it."""
    from altiplano.cluster.diff import plan
    from altiplano.cluster.kube import RAY_SERVICE
    from altiplano.cluster.rayservice import patch_of, user_config, with_user_config
    from altiplano.serve.control import named

    timeout_s = seconds_of("--timeout", timeout)
    pipeline = load(file, overrides).pipeline
    found = release_of(context, namespace, release)
    service = found.endpoint()
    name = pipeline.tracking.registered_model_name or pipeline.run.name
    words = [name, "--to", str(directory), *(["--alias", alias] if version is None else ["--version", str(version)])]
    wanted = _in_cluster(found, [*words, "--look-only"], tracking_uri)
    made = _rendered(pipeline, service, f"{name}-{wanted['version']}", wanted["path"], alias, keep_settings=keep_settings)
    # The server's own checks, before anybody is asked.
    found.kube.apply(RAY_SERVICE, patch_of(made), dry_run=True)
    plans = [one for one in [plan(_unnamed(service), made)] if one.changes]
    if output is Output.json:
        print_json({"name": name, "version": wanted["version"], "path": wanted["path"], "changes": to_json(plans)})
    else:
        err.print(f"{name} version {wanted['version']} on {service['metadata']['name']}", markup=False)
        show(plans)
    refusal = None
    if not plans:
        hint("the endpoint is already like this")
        # Applied is not taken: whoever applied it may have been told of a replica that refuses.
        refusal = _refused_before(found, service, timeout_s, output) if wait and not dry_run else None
        if refusal is None:
            return
    # What a replica lacked may be there now, and replicas look at a change once: it gets another name.
    if not agreed("Offer it to the replicas again?" if refusal else "Apply this?", dry_run=dry_run, yes=yes):
        if refusal:
            raise refusal
        return
    _in_cluster(found, [*words[:3], "--version", str(wanted["version"])], tracking_uri)
    # KubeRay tells that it has seen a change before Ray Serve has it, so each change gets a name by which it is found there.
    made = with_user_config(made, named(user_config(made)))
    found.kube.apply(RAY_SERVICE, patch_of(made))
    if wait:
        _confirm(found, made, timeout_s)
    if output is Output.text:
        live = "every replica has taken it" if wait else f"is it live? altiplano cluster status --release {release}"
        out.print(f"applied; {live}", markup=False)
    hint(
        f"keep it across upgrades of the chart: endpoint.adapters.{name}-{wanted['version']}={wanted['path']}, "
        f"endpoint.aliases.{alias}={name}-{wanted['version']}"
    )


def _refused_before(found: "Release", service: "Object", timeout_s: float, output: Output) -> "RefusedConfigError | None":
    """Why a replica has refused what was applied earlier; None: all have taken it, or it has no name and nobody was asked. Says which.

    Other errors are those of `_confirm`.
    """
    from altiplano.cluster.rayservice import user_config
    from altiplano.serve.control import CHANGE, RefusedConfigError

    if CHANGE not in user_config(service):
        hint(
            "it was not applied by this command, so it has no name by which replicas could be asked, and it cannot be confirmed that they "
            "have taken it: GET /v1/models of the endpoint lists what is served, the replicas' logs say why something is not"
        )
        return None
    try:
        _confirm(found, service, timeout_s, quiet=RefusedConfigError)
    except RefusedConfigError as refusal:
        hint(f"when it was applied, {refusal}")
        return refusal
    if output is Output.text:
        out.print("every replica has taken it", markup=False)
    return None


def _confirm(found: "Release", applied: "Object", timeout_s: float, quiet: type[Exception] | tuple[()] = ()) -> None:
    """Return when every replica has taken what a RayService says, by the name of its change. No hint comes with an error of type `quiet`.

    Raises:
        ControlError: one does not take it, the endpoint does not come up with it, or not in time. It stays applied.
        ClusterUnreachableError: there is no way to the head of the endpoint's cluster.
        NotInstalledError: the Secret with Ray's token is not there.
        RefusedError: the API server does not let this user reach it.
    """
    from altiplano.cluster.kube import ClusterUnreachableError, RefusedError
    from altiplano.cluster.kube_release import NotInstalledError
    from altiplano.cluster.rayservice import user_config
    from altiplano.pipeline.kube_serving import control_of
    from altiplano.serve.control import CHANGE, ControlError

    try:
        with control_of(found, applied) as control:
            control.confirm(user_config(applied)[CHANGE], timeout_s)
    except (ControlError, ClusterUnreachableError, NotInstalledError, RefusedError, KeyboardInterrupt) as error:
        if not isinstance(error, quiet):
            hint("it is applied, and KubeRay goes on with it; deploy another --version to take it back")
        if isinstance(error, KeyboardInterrupt):
            raise typer.Exit(130) from None
        raise


def _unnamed(service: "Object") -> "Object":
    """A RayService without the name of its last change: every apply has another, and it changes nothing."""
    from altiplano.cluster.rayservice import user_config, with_user_config
    from altiplano.serve.control import CHANGE, unnamed

    config = user_config(service)
    return with_user_config(service, unnamed(config)) if CHANGE in config else service


def _rendered(
    pipeline: "spec.Pipeline", service: "Object", served: str, path: str, alias: str, *, keep_settings: bool
) -> "Object":
    from altiplano.cluster.rayservice import user_config, with_model, with_user_config
    from altiplano.pipeline.serving import with_adapter

    adapters = with_adapter(user_config(service), served, path, alias)
    if keep_settings:
        return with_user_config(service, adapters)
    from altiplano.pipeline.stages.deploy import serve_settings
    from altiplano.serve.application import serve_config

    settings = serve_settings(pipeline, pipeline.model.model_name_or_path, served, path, None)
    return with_user_config(with_model(service, serve_config(settings, pipeline.serve)), adapters)


def _in_cluster(found: "Release", words: list[str], tracking_uri: str | None) -> dict[str, Any]:
    """`altiplano.registry.fetch` as a job: only pods reach both the registry and the volume.

    Raises:
        ValueError: the registry has no such version.
        ConnectionError: MLflow does not answer there.
    """
    command = shlex.join(["python", "-m", "altiplano.registry.fetch", *words])
    with found.ray_jobs(found.jobs_cluster()) as ray_jobs:
        job_id = ray_jobs.submit(command, env={"MLFLOW_TRACKING_URI": tracking_uri} if tracking_uri else {})
        job = ray_jobs.wait(job_id, FETCH_TIMEOUT_S)
        lines = ray_jobs.log(job_id).strip().splitlines()
    if job.status == "SUCCEEDED":
        answer: dict[str, Any] = json.loads(next(line for line in reversed(lines) if line.startswith("{")))
        return answer
    reason = next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), job.message)
    if job.exit_code == 4:
        raise ConnectionError(reason)
    raise ValueError(f"{reason} (the whole log: altiplano jobs logs {job_id})")
