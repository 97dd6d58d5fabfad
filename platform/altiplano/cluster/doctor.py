"""What is wrong with a release, and what to do about it."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

import httpx

from altiplano.cluster import doctor_pods
from altiplano.cluster.doctor_pods import GPU
from altiplano.cluster.kube import (
    CLAIM,
    DEPLOYMENT,
    POD,
    RAY_CLUSTER,
    RAY_SERVICE,
    SECRET,
    ClusterUnreachableError,
    Object,
    RefusedError,
    conditions,
)
from altiplano.cluster.kube_forward import forwarded
from altiplano.cluster.kube_release import CHILD, INSTANCE, Release
from altiplano.cluster.status import OPERATOR, active_cluster, gpus, operator_version

# Older operators do not know fields that the chart sets by default.
OLDEST_KUBERAY = (1, 5, 1)
MLFLOW_PORT = 5000
ANSWER_TIMEOUT_S = 5.0
KINDS = {"RayCluster", "RayJob", "RayService"}
BROKEN_APPLICATION = ("DEPLOY_FAILED", "UNHEALTHY")


class Verdict(StrEnum):
    """ok; warn: works, or may come by itself; fail: does not work until somebody does something."""

    ok = "ok"
    warn = "warn"
    fail = "fail"


@dataclass(frozen=True)
class Check:
    """One question. `advice`: what to do when it is not ok."""

    name: str
    verdict: Verdict
    detail: str
    advice: str = ""


def examine(release: Release, now: datetime) -> list[Check]:
    """Every check in the order in which things depend on one another.

    Raises:
        ClusterUnreachableError: the Kubernetes API does not answer.
    """
    checks = [Check("Kubernetes API", Verdict.ok, f"{release.kube.version()} at {release.kube.server}")]
    for look in (_kuberay, _operator, _objects, _secret, _clusters, _services, _volumes, _pods, _gpus, _mlflow, _dashboards):
        checks += _allowed(look, release, now)
    return checks


Look = Callable[[Release, datetime], Iterator[Check]]


def _allowed(look: Look, release: Release, now: datetime) -> list[Check]:
    """What `look` finds; what this account may not see is said, and the rest goes on."""
    try:
        return list(look(release, now))
    except RefusedError as error:
        name = look.__name__.removeprefix("_")
        return [Check(name, Verdict.warn, str(error), "ask for the right to read, or run this with another --context")]


def _kuberay(release: Release, now: datetime) -> Iterator[Check]:
    missing = KINDS - release.kube.kinds("ray.io/v1")
    if missing:
        yield Check(
            "KubeRay's kinds",
            Verdict.fail,
            f"this cluster does not know {', '.join(sorted(missing))}",
            "the operator comes first: step 1 of docs/install.md",
        )
    else:
        yield Check("KubeRay's kinds", Verdict.ok, "ray.io/v1")


def _operator(release: Release, now: datetime) -> Iterator[Check]:
    found = release.kube.find(DEPLOYMENT, OPERATOR, everywhere=True)
    if not found:
        yield Check(
            "operator",
            Verdict.fail,
            "KubeRay's operator is not installed",
            "step 1 of docs/install.md, or `altiplano cluster install --operator`",
        )
        return
    version, name = operator_version(found[0]), found[0]["metadata"]["name"]
    namespace = found[0]["metadata"]["namespace"]
    if not found[0].get("status", {}).get("readyReplicas"):
        yield Check("operator", Verdict.fail, f"{version} does not run", f"kubectl -n {namespace} describe deployment {name}")
    elif _numbers(version) < OLDEST_KUBERAY:
        oldest = ".".join(map(str, OLDEST_KUBERAY))
        yield Check(
            "operator",
            Verdict.fail,
            f"{version} is older than {oldest}",
            "raise it: kinds first, then the operator (docs/install.md, step 1)",
        )
    else:
        yield Check("operator", Verdict.ok, f"{version} in namespace {namespace}")


def _objects(release: Release, now: datetime) -> Iterator[Check]:
    labels = {INSTANCE: release.name}
    found = [
        *release.kube.find(RAY_CLUSTER, labels),
        *release.kube.find(RAY_SERVICE, labels),
        *release.kube.find(DEPLOYMENT, labels),
    ]
    if found:
        yield Check("release", Verdict.ok, f"{release.name} in namespace {release.kube.namespace}")
    else:
        yield Check(
            "release",
            Verdict.fail,
            f"namespace {release.kube.namespace} has nothing of a release {release.name}",
            "name yours with -n and --release (`helm list -A`), or install it: altiplano cluster install",
        )


def _secret(release: Release, now: datetime) -> Iterator[Check]:
    """Secrets and keys that pods of the release name."""
    wanted: dict[str, set[str]] = {}
    for pod in release.kube.find(POD, {INSTANCE: release.name}):
        for container in pod["spec"].get("containers", []):
            references = [entry.get("valueFrom", {}).get("secretKeyRef", {}) for entry in container.get("env", [])]
            for reference in references:
                if reference and not reference.get("optional"):
                    wanted.setdefault(reference["name"], set()).add(reference["key"])
    for name, keys in sorted(wanted.items()):
        secret = release.kube.get(SECRET, name)
        missing = sorted(keys - set((secret or {}).get("data") or {}))
        if missing:
            what = f"has no key {', '.join(missing)}" if secret else "is not there"
            yield Check(f"Secret {name}", Verdict.fail, what, "make it as in step 3 of docs/install.md")


def _clusters(release: Release, now: datetime) -> Iterator[Check]:
    for cluster in release.kube.find(RAY_CLUSTER, {INSTANCE: release.name}):
        yield _cluster(release, cluster)


def _cluster(release: Release, cluster: Object) -> Check:
    name, found = cluster["metadata"]["name"], conditions(cluster)
    title = f"RayCluster {name}"
    if cluster["spec"].get("suspend"):
        return Check(title, Verdict.warn, "suspended", "Kueue has no room for it, or somebody set spec.suspend")
    if found.get("ReplicaFailure", {}).get("status") == "True":
        failure = found["ReplicaFailure"]
        return Check(
            title,
            Verdict.fail,
            f"{failure.get('reason')}: {failure.get('message', '')}",
            "the operator cannot make its pods: quota, admission or account",
        )
    if found.get("HeadPodReady", {}).get("status") == "True" or cluster.get("status", {}).get("state") == "ready":
        return Check(title, Verdict.ok, "head ready")
    return _operators_warning(release, title, name) or Check(
        title, Verdict.warn, found.get("HeadPodReady", {}).get("message") or "its head is not ready", "see the pods below"
    )


def _services(release: Release, now: datetime) -> Iterator[Check]:
    for service in release.kube.find(RAY_SERVICE, {INSTANCE: release.name}):
        yield _service(release, service)


def _service(release: Release, service: Object) -> Check:
    name = service["metadata"]["name"]
    title, ready = f"RayService {name}", conditions(service).get("Ready", {})
    state = service.get("status", {})
    told = {
        application: entry
        for part in ("activeServiceStatus", "pendingServiceStatus")
        for application, entry in state.get(part, {}).get("applicationStatuses", {}).items()
    }
    for application, entry in told.items():
        if entry.get("status") in BROKEN_APPLICATION:
            logs = f"the replica says why: altiplano cluster logs endpoint --release {release.name}"
            return Check(
                title, Verdict.fail, f"{application} is {entry['status']}: {entry.get('message', '').strip()[-300:]}", logs
            )
    if ready.get("status") == "True":
        return Check(title, Verdict.ok, ", ".join(f"{a} {entry.get('status')}" for a, entry in told.items()) or "ready")
    return _operators_warning(release, title, name) or Check(
        title, Verdict.warn, ready.get("message") or "not ready yet", "the first start downloads the model; see the pods below"
    )


def _operators_warning(release: Release, title: str, name: str) -> Check | None:
    """What the operator says against an object that is not ready, if anything."""
    warning = next((event for event in release.kube.events_of(name) if event.get("type") == "Warning"), None)
    if warning is None:
        return None
    return Check(
        title,
        Verdict.fail,
        f"{warning['reason']}: {warning['message']}",
        "these are the operator's words: correct the values, then `altiplano cluster install`",
    )


def _volumes(release: Release, now: datetime) -> Iterator[Check]:
    for claim in release.kube.find(CLAIM, {INSTANCE: release.name}):
        if claim.get("status", {}).get("phase") == "Bound":
            continue
        name, modes = claim["metadata"]["name"], ", ".join(claim["spec"].get("accessModes", []))
        storage = claim["spec"].get("storageClassName") or "the cluster's default class"
        warning = next(iter(release.kube.events_of(name)), {}).get("message", "no provisioner has answered")
        yield Check(
            f"volume {name}",
            Verdict.fail,
            f"not bound: {warning}",
            f"{storage} must exist and offer {modes}: set storage.storageClassName (`kubectl get storageclass`)",
        )


def _pods(release: Release, now: datetime) -> Iterator[Check]:
    pods = release.kube.find(POD, {INSTANCE: release.name})
    troubled = 0
    for pod in pods:
        created = pod["metadata"].get("creationTimestamp")
        age_s = (now - datetime.fromisoformat(created)).total_seconds() if created else 0.0
        found = doctor_pods.trouble(pod, release.kube.events_of(pod["metadata"]["name"]) if _may_need_events(pod) else [], age_s)
        if found is not None:
            troubled += 1
            yield Check(f"pod {found.pod}", Verdict.fail, found.reason, found.advice)
    if pods and not troubled:
        yield Check("pods", Verdict.ok, f"{len(pods)}, none in trouble")


def _gpus(release: Release, now: datetime) -> Iterator[Check]:
    wanted = any(
        GPU in container.get("resources", {}).get("limits", {})
        for cluster in release.kube.find(RAY_CLUSTER, {INSTANCE: release.name})
        for group in cluster["spec"].get("workerGroupSpecs", [])
        for container in group["template"]["spec"]["containers"]
    )
    if not wanted:
        return
    found = gpus(release.kube)
    if found.allocatable == 0:
        yield Check(
            "GPUs",
            Verdict.warn,
            "no node offers nvidia.com/gpu now",
            "fine when a node pool scales from zero; otherwise install NVIDIA's device plugin or GPU operator",
        )
    else:
        held = "" if found.held is None else f", {found.held} held"
        yield Check("GPUs", Verdict.ok, f"{found.allocatable} on {found.nodes} nodes{held}")


def _mlflow(release: Release, now: datetime) -> Iterator[Check]:
    pods = release.kube.find(POD, release.labels("mlflow"))
    running = next((pod for pod in pods if pod.get("status", {}).get("phase") == "Running"), None)
    if running is None:
        if pods:
            yield Check("MLflow", Verdict.fail, "no pod of it runs", "see the pods above")
        return
    name = running["metadata"]["name"]
    try:
        with forwarded(release.kube, name, MLFLOW_PORT) as address:
            answer = httpx.get(f"{address}/health", timeout=ANSWER_TIMEOUT_S)
    except (httpx.HTTPError, ClusterUnreachableError) as error:
        yield Check(
            "MLflow", Verdict.fail, f"does not answer ({error})", f"altiplano cluster logs mlflow; kubectl describe pod {name}"
        )
        return
    if answer.status_code == httpx.codes.OK:
        yield Check("MLflow", Verdict.ok, "healthy")
    else:
        yield Check(
            "MLflow", Verdict.fail, f"answers {answer.status_code}", "its database may be away: altiplano cluster logs mlflow"
        )


def _dashboards(release: Release, now: datetime) -> Iterator[Check]:
    """Ray's control planes, asked with their tokens, and the autoscalers beside them."""
    answering = {active_cluster(service) for service in release.kube.find(RAY_SERVICE, {INSTANCE: release.name})}
    for cluster in release.kube.find(RAY_CLUSTER, {INSTANCE: release.name}):
        name = cluster["metadata"]["name"]
        if CHILD in cluster["metadata"]["labels"] and name not in answering:
            continue
        with contextlib.suppress(ClusterUnreachableError):  # its pod was said above
            head = release.head(cluster)
            yield _dashboard(release, cluster)
            if cluster["spec"].get("enableInTreeAutoscaling"):
                yield _autoscaler(name, head)


def _dashboard(release: Release, cluster: Object) -> Check:
    title = f"Ray of {cluster['metadata']['name']}"
    try:
        with release.ray_jobs(cluster) as ray_jobs:
            running = sum(job.status == "RUNNING" for job in ray_jobs.list())
    except (ConnectionError, ValueError, RuntimeError) as error:
        return Check(
            title, Verdict.fail, str(error), "kubectl logs of its head says more; a head that was replaced may need a minute"
        )
    return Check(title, Verdict.ok, f"answers, takes its token, {running} jobs running")


def _autoscaler(name: str, head: Object) -> Check:
    title, pod = f"autoscaler of {name}", head["metadata"]["name"]
    own = next((c for c in head["status"].get("containerStatuses", []) if c["name"] == "autoscaler"), None)
    if own is None:
        return Check(
            title,
            Verdict.fail,
            "its container is missing",
            "was autoscaling switched on after the head started? delete the head pod",
        )
    if not own.get("ready"):
        return Check(title, Verdict.fail, f"{own.get('restartCount', 0)} restarts", f"kubectl logs {pod} -c autoscaler")
    return Check(title, Verdict.ok, "runs")


def _may_need_events(pod: Object) -> bool:
    """Only pods that are neither running well nor waiting for a node are explained by their events."""
    status = pod.get("status", {})
    return status.get("phase") == "Pending" and conditions(pod).get("PodScheduled", {}).get("status") != "False"


def _numbers(version: str) -> tuple[int, ...]:
    """(1, 7, 0) of v1.7.0-rc.1; an unknown form counts as new."""
    parts = version.lstrip("v").partition("-")[0].split(".")
    return tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else OLDEST_KUBERAY
