"""Why a pod does not start, from what Kubernetes says about it: pure functions over its JSON."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from altiplano.cluster.kube import Object, conditions

GPU = "nvidia.com/gpu"
# Seconds of a start in which nothing is wrong yet.
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Trouble:
    """Why a pod does not run, and what to do."""

    pod: str
    reason: str
    advice: str


_WAITING = {
    "ErrImagePull": "push the image, or correct image.repository, image.tag and imagePullSecrets",
    "ImagePullBackOff": "push the image, or correct image.repository, image.tag and imagePullSecrets",
    "ErrImageNeverPull": "load the image onto the node (`kind load docker-image …`), or set image.pullPolicy=IfNotPresent",
    "InvalidImageName": "correct image.repository and image.tag",
    "CreateContainerConfigError": "make the Secret or key that it names (docs/install.md, step 3)",
    "CreateContainerError": "`kubectl describe pod` has the runtime's own words",
    "RunContainerError": "`kubectl describe pod` has the runtime's own words; on GPU nodes check NVIDIA's runtime",
}
_SCHEDULING = (
    ("Insufficient " + GPU, "no node has that many GPUs free: add nodes, lower the number of workers, or stop a job"),
    (
        "Insufficient memory",
        "no node has that much memory free: add or enlarge nodes, or lower resources.requests.memory of the group",
    ),
    ("Insufficient cpu", "no node has that many CPUs free: add or enlarge nodes, or lower resources.requests.cpu of the group"),
    ("Insufficient ephemeral-storage", "the nodes' disks are full or small"),
    (
        "unbound immediate PersistentVolumeClaims",
        "a volume is not bound: does the storage class exist, and does it offer ReadWriteMany?",
    ),
    ("untolerated taint", "the nodes repel it: add tolerations to the group"),
    ("didn't match Pod's node affinity", "no node has the labels of nodeSelector or affinity"),
)
_EVENTS = {
    "FailedMount": "the volume or Secret in this message must exist",
    "FailedAttachVolume": "a volume with ReadWriteOnce hangs on another node: use a class with ReadWriteMany",
    "FailedCreatePodSandBox": "the node's network or runtime is broken: cordon it",
}


def trouble(pod: Object, events: Iterable[Object], age_s: float) -> Trouble | None:
    """What keeps `pod` from running, or None while all is well or it may still come by itself.

    `events`: those of the pod, the newest first.
    """
    name, status = pod["metadata"]["name"], pod.get("status", {})
    if status.get("phase") == "Succeeded" or "deletionTimestamp" in pod["metadata"]:
        return None
    if status.get("phase") == "Failed" and not _containers(status):
        return Trouble(
            name,
            f"{status.get('reason', 'Failed')}: {status.get('message', '')}".strip(": "),
            "the node ended it: see its events",
        )
    scheduled = conditions(pod).get("PodScheduled", {})
    if scheduled.get("status") == "False":
        return _unscheduled(name, scheduled)
    for container in _containers(status):
        if found := _of_container(name, container):
            return found
    if status.get("phase") == "Running" and _ready(pod):
        return None
    if age_s < PATIENCE_S:
        return None
    for event in events:
        if event.get("reason") in _EVENTS:
            return Trouble(name, f"{event['reason']}: {_short(event.get('message', ''))}", _EVENTS[event["reason"]])
    return _slow(name, pod)


def gpus_requested(pod: Object) -> int:
    """GPUs that a pod holds or waits for."""
    return sum(int(c.get("resources", {}).get("limits", {}).get(GPU, 0)) for c in pod["spec"].get("containers", []))


def _unscheduled(name: str, condition: Object) -> Trouble:
    message = condition.get("message", "")
    advice = next(
        (advice for words, advice in _SCHEDULING if words in message), "`kubectl describe pod` has the scheduler's own words"
    )
    return Trouble(name, f"no node takes it: {_short(message)}", advice)


def _of_container(pod: str, status: Object) -> Trouble | None:
    waiting, ended = status.get("state", {}).get("waiting", {}), _ended(status)
    reason, name = waiting.get("reason", ""), status["name"]
    if reason in _WAITING:
        return Trouble(pod, f"{name}: {reason}: {_short(waiting.get('message', ''))}", _WAITING[reason])
    broken = reason == "CrashLoopBackOff" or status.get("state", {}).get("terminated", {}).get("exitCode", 0) != 0
    if not broken:
        return None
    if ended.get("reason") == "OOMKilled":
        return Trouble(
            pod, f"{name}: ended by the kernel, out of memory", "raise resources.limits.memory (and requests) of the group"
        )
    count = status.get("restartCount", 0)
    return Trouble(
        pod,
        f"{name}: ended with code {ended.get('exitCode', '?')}, {count} restart{'' if count == 1 else 's'}",
        f"its last words: kubectl logs {pod} -c {name} --previous",
    )


def _slow(name: str, pod: Object) -> Trouble:
    waiting = [c["name"] for c in _containers(pod.get("status", {})) if not c.get("ready")]
    init = [c["name"] for c in pod.get("status", {}).get("initContainerStatuses", []) if not c.get("ready")]
    if init:
        return Trouble(name, f"still in {', '.join(init)}", "Ray's workers wait for their head: is it Running, and is DNS open?")
    return Trouble(
        name, f"not ready: {', '.join(waiting) or pod.get('status', {}).get('phase', 'Unknown')}", f"kubectl logs {name}"
    )


def _containers(status: Object) -> list[Any]:
    return [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]


def _ended(status: Object) -> Object:
    found: Object = status.get("state", {}).get("terminated") or status.get("lastState", {}).get("terminated") or {}
    return found


def _ready(pod: Object) -> bool:
    return conditions(pod).get("Ready", {}).get("status") == "True"


def _short(text: str) -> str:
    """The first sentence or line that says something, without a tail of preemption details."""
    return re.split(r"\n|\. (?=preemption)", text.strip())[0][:200]
