"""A RayJob: one entrypoint with a cluster of its own, which goes when the job ends.

Its pods are those of the release's cluster for jobs, so image, volumes, accounts and guards have one source, the chart.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from altiplano.cluster.kube import Object

# KubeRay's limit; its pods' names need the rest.
NAME = re.compile(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?")
# Not allowed inside a RayJob, or of no use to one: a job whose head dies starts again in a new cluster.
_OF_STANDING_CLUSTERS = ("upgradeStrategy", "gcsFaultToleranceOptions", "managedBy", "suspend")
QUEUE = "kueue.x-k8s.io/queue-name"


class RayJobError(ValueError):
    """This RayJob could not run; the message says what to change."""


@dataclass(frozen=True)
class JobWish:
    """What a user asks for. Times in seconds."""

    name: str
    entrypoint: str
    workers: Mapping[str, int] = field(default_factory=dict)  # by group; the others start with none
    env: Mapping[str, str] = field(default_factory=dict)
    working_dir: str | None = None  # an address that pods can read
    keep_for_s: int = 600  # how long cluster and log stay after the end
    deadline_s: int | None = None
    retries: int = 0  # each in a new cluster
    queue: str | None = None  # of Kueue


def ray_job(cluster: Object, wish: JobWish) -> Object:
    """The RayJob, after the RayCluster `cluster`.

    Raises:
        RayJobError: a name that KubeRay does not take, an unknown group, or a queue without a fixed size.
    """
    _check(cluster, wish)
    spec: Object = {
        "entrypoint": wish.entrypoint,
        # The operator submits over HTTP, which the release's NetworkPolicies let it; a submitter pod would need an opening of its own.
        "submissionMode": "HTTPMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": wish.keep_for_s,
        "backoffLimit": wish.retries,
        "rayClusterSpec": _cluster_spec(cluster["spec"], wish),
    }
    runtime_env: dict[str, Any] = {"env_vars": dict(wish.env)} if wish.env else {}
    if wish.working_dir is not None:
        runtime_env["working_dir"] = wish.working_dir
    if runtime_env:
        spec["runtimeEnvYAML"] = yaml.safe_dump(runtime_env)
    if wish.deadline_s is not None:
        spec["activeDeadlineSeconds"] = wish.deadline_s
    labels = {key: value for key, value in cluster["metadata"].get("labels", {}).items() if _ours(key)}
    if wish.queue is not None:
        # Kueue takes the suspension away when there is room.
        spec["suspend"] = True
        labels[QUEUE] = wish.queue
    metadata = {"name": wish.name, "namespace": cluster["metadata"]["namespace"], "labels": labels}
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}


def gpus_of(manifest: Object) -> tuple[int, int]:
    """GPUs of a RayJob: those that it starts with, and the most that its autoscaler may take."""
    groups = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    scales = manifest["spec"]["rayClusterSpec"].get("enableInTreeAutoscaling", False)
    first = sum(_gpus(group) * group["replicas"] for group in groups)
    return first, sum(_gpus(group) * group["maxReplicas"] for group in groups) if scales else first


def _check(cluster: Object, wish: JobWish) -> None:
    if not NAME.fullmatch(wish.name):
        raise RayJobError(f"{wish.name!r} is no name for a RayJob: lower case letters, digits and -, a letter first, at most 47")
    groups = {group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]}
    if unknown := sorted(set(wish.workers) - set(groups)):
        raise RayJobError(f"no worker group {', '.join(unknown)}: this release has {', '.join(groups)}")
    for name, count in wish.workers.items():
        if count > groups[name]["maxReplicas"]:
            raise RayJobError(
                f"{count} workers of {name}: the release allows {groups[name]['maxReplicas']} (rayCluster.workerGroups.{name}.maxReplicas)"
            )
    if wish.queue is not None and not wish.workers:
        raise RayJobError("a queue admits a cluster of a fixed size: say it with --workers GROUP=COUNT")
    if wish.working_dir is not None and "://" not in wish.working_dir:
        raise RayJobError(
            f"a RayJob cannot upload {wish.working_dir}: give an address that pods can read (https://…zip, s3://…zip), use what is in the image "
            "or on /workspace, or submit to the standing cluster (--to cluster)"
        )


def _cluster_spec(standing: Object, wish: JobWish) -> Object:
    spec = {key: value for key, value in copy.deepcopy(standing).items() if key not in _OF_STANDING_CLUSTERS}
    if wish.queue is not None:
        spec.pop("autoscalerOptions", None)
        spec["enableInTreeAutoscaling"] = False
    spec["workerGroupSpecs"] = [
        _group(group, wish, spec.get("enableInTreeAutoscaling", False)) for group in spec["workerGroupSpecs"]
    ]
    return spec


def _group(group: Object, wish: JobWish, scales: bool) -> Object:
    """A group with its own count; pods that the standing cluster's autoscaler marked are not ours."""
    count = wish.workers.get(group["groupName"], 0)
    bounds = {"minReplicas": count, "replicas": count, "maxReplicas": group["maxReplicas"] if scales else count}
    return {key: value for key, value in group.items() if key not in ("scaleStrategy", "suspend")} | bounds


def _gpus(group: Object) -> int:
    limits = group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
    hosts = group.get("numOfHosts", 1)
    return int(limits.get("nvidia.com/gpu", 0)) * int(hosts)


def _ours(label: str) -> bool:
    """Labels that say whose it is, without those of Helm: an uninstall must not look for a job of a user."""
    return not label.startswith(("helm.sh/", "kueue.")) and label != "app.kubernetes.io/managed-by"
