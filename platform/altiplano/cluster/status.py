"""What a release looks like now: operator, Ray clusters, endpoint, MLflow, databases, volumes, GPUs."""

from dataclasses import dataclass
from typing import Any

from altiplano.cluster.doctor_pods import GPU, gpus_requested
from altiplano.cluster.kube import (
    CLAIM,
    DEPLOYMENT,
    NODE,
    POD,
    RAY_CLUSTER,
    RAY_JOB,
    RAY_SERVICE,
    STATEFUL_SET,
    Kube,
    Object,
    RefusedError,
    conditions,
)
from altiplano.cluster.kube_release import CHILD, INSTANCE, Release

OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}
AUTOSCALER = "autoscaler"
BEFORE_END = ("Complete", "Failed")


@dataclass(frozen=True)
class Line:
    """One part: what it is, one word about it, and the rest."""

    part: str
    state: str
    detail: str


@dataclass(frozen=True)
class Gpus:
    """GPUs of all nodes that take pods, and those that pods hold; `held` None: this account may not look."""

    allocatable: int
    nodes: int
    held: int | None


def status(release: Release) -> list[Line]:
    """Every part of the release, those that are not there left out."""
    kube = release.kube
    lines = [Line("Kubernetes", kube.version(), kube.server), operator(kube)]
    labels = {INSTANCE: release.name}
    clusters = [c for c in kube.find(RAY_CLUSTER, labels) if CHILD not in c["metadata"]["labels"]]
    for cluster in clusters:
        lines += ray_cluster(kube, cluster)
    for service in kube.find(RAY_SERVICE, labels):
        lines.append(ray_service(service))
        active = kube.get(RAY_CLUSTER, active_cluster(service) or "-")
        lines += [] if active is None else ray_cluster(kube, active)
    for kind in (DEPLOYMENT, STATEFUL_SET):
        lines += [_replicas(manifest) for manifest in kube.find(kind, labels)]
    lines += [_claim(claim) for claim in kube.find(CLAIM, labels)]
    if jobs := [job for job in kube.find(RAY_JOB, labels) if job.get("status", {}).get("jobDeploymentStatus") not in BEFORE_END]:
        lines.append(Line("RayJobs", f"{len(jobs)} running", ", ".join(job["metadata"]["name"] for job in jobs)))
    lines.append(_gpus(kube))
    return lines


def operator(kube: Kube) -> Line:
    """KubeRay's operator, wherever in the cluster it runs."""
    try:
        found = kube.find(DEPLOYMENT, OPERATOR, everywhere=True)
    except RefusedError:
        return Line("KubeRay", "unknown", "your account may not look into other namespaces")
    if not found:
        return Line("KubeRay", "absent", "no operator in this cluster: step 1 of docs/install.md")
    manifest = found[0]
    state = "ready" if manifest.get("status", {}).get("readyReplicas") else "not ready"
    return Line("KubeRay", state, f"{operator_version(manifest)} in namespace {manifest['metadata']['namespace']}")


def operator_version(deployment: Object) -> str:
    """The tag of its image, as in v1.7.0."""
    image: str = deployment["spec"]["template"]["spec"]["containers"][0]["image"]
    return image.partition("@")[0].rpartition(":")[2]


def ray_cluster(kube: Kube, cluster: Object) -> list[Line]:
    """A RayCluster, and its worker groups."""
    name, state = cluster["metadata"]["name"], cluster.get("status", {})
    pods = kube.find(POD, {"ray.io/cluster": name})
    head = next((pod for pod in pods if pod["metadata"]["labels"].get("ray.io/node-type") == "head"), None)
    ready = conditions(cluster).get("HeadPodReady", {})
    word = state.get("state") or ("head ready" if ready.get("status") == "True" else "head not ready")
    scales = cluster["spec"].get("enableInTreeAutoscaling", False)
    details = ["no head pod" if head is None else f"head {head['metadata']['name']}", f"autoscaler {_autoscaler(head, scales)}"]
    lines = [Line(f"RayCluster {name}", word, ", ".join(details))]
    for group in cluster["spec"].get("workerGroupSpecs", []):
        own = [pod for pod in pods if pod["metadata"]["labels"].get("ray.io/group") == group["groupName"]]
        running = sum(pod.get("status", {}).get("phase") == "Running" for pod in own)
        bounds = f"{group.get('minReplicas', 0)} to {group.get('maxReplicas', 0)}" if scales else "fixed"
        lines.append(Line(f"  {group['groupName']}", f"{running}/{group.get('replicas', 0)}", bounds))
    return lines


def ray_service(service: Object) -> Line:
    """A RayService: its conditions and its application."""
    found, state = conditions(service), service.get("status", {})
    ready = found.get("Ready", {})
    word = "ready" if ready.get("status") == "True" else "not ready"
    active = state.get("activeServiceStatus", {})
    details = [
        f"{application} {told.get('status', 'UNKNOWN')}" for application, told in active.get("applicationStatuses", {}).items()
    ]
    if word == "not ready" and ready.get("message"):
        details.append(ready["message"])
    if found.get("UpgradeInProgress", {}).get("status") == "True":
        pending = state.get("pendingServiceStatus", {}).get("rayClusterName", "a new cluster")
        details.append(f"{pending} takes over")
    return Line(f"RayService {service['metadata']['name']}", word, ", ".join(details) or "no cluster yet")


def active_cluster(service: Object) -> str | None:
    """The name of the RayCluster that answers now."""
    name: str | None = service.get("status", {}).get("activeServiceStatus", {}).get("rayClusterName")
    return name


def gpus(kube: Kube) -> Gpus:
    """
    Raises:
        RefusedError: this account may not look at nodes.
    """
    nodes = [node for node in kube.find(NODE, everywhere=True) if not node["spec"].get("unschedulable")]
    counts = [int(node["status"].get("allocatable", {}).get(GPU, 0)) for node in nodes]
    try:
        pods = kube.find(POD, everywhere=True)
    except RefusedError:
        return Gpus(sum(counts), sum(count > 0 for count in counts), None)
    held = sum(gpus_requested(pod) for pod in pods if pod["spec"].get("nodeName") and _alive(pod))
    return Gpus(sum(counts), sum(count > 0 for count in counts), held)


def _alive(pod: Object) -> bool:
    return pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")


def _gpus(kube: Kube) -> Line:
    try:
        found = gpus(kube)
    except RefusedError:
        return Line("GPUs", "unknown", "your account may not look at nodes")
    held = "" if found.held is None else f"{found.held} held"
    return Line(
        "GPUs", str(found.allocatable), f"{held or 'how many are held is not yours to see'}, {found.nodes} nodes with GPUs"
    )


def _autoscaler(head: Object | None, wanted: bool) -> str:
    if not wanted:
        return "off"
    found: list[Any] = [] if head is None else head.get("status", {}).get("containerStatuses", [])
    own = next((container for container in found if container["name"] == AUTOSCALER), None)
    return "runs" if own and own.get("ready") else "does not run"


def _replicas(manifest: Object) -> Line:
    wanted, ready = manifest["spec"].get("replicas", 1), manifest.get("status", {}).get("readyReplicas", 0)
    component = manifest["metadata"]["labels"].get("app.kubernetes.io/component", manifest["kind"])
    return Line(component, f"{ready}/{wanted}", f"{manifest['kind']} {manifest['metadata']['name']}")


def _claim(claim: Object) -> Line:
    size = claim.get("status", {}).get("capacity", {}).get("storage") or claim["spec"]["resources"]["requests"]["storage"]
    return Line(f"volume {claim['metadata']['name']}", claim.get("status", {}).get("phase", "Pending"), size)
