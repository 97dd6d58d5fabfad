"""Pods out of every object that makes some, as plain Pods that any checker understands."""

import copy
from collections.abc import Iterator
from typing import Any

from .charts import Object

RESERVED = ("ray.io/node-type", "ray.io/group", "ray.io/cluster")


def pods(objects: list[Object]) -> list[Object]:
    """Every pod template as a Pod. Those of Ray clusters have the labels that KubeRay adds."""
    return [pod for manifest in objects for pod in _of(manifest)]


def _of(manifest: Object) -> Iterator[Object]:
    kind, name, namespace = manifest["kind"], manifest["metadata"]["name"], manifest["metadata"].get("namespace")
    match kind:
        case "Pod":
            yield _pod(manifest, name, namespace, {})
        case "Deployment" | "StatefulSet" | "Job":
            yield _pod(manifest["spec"]["template"], name, namespace, {})
        case "CronJob":
            yield _pod(manifest["spec"]["jobTemplate"]["spec"]["template"], name, namespace, {})
        case "RayCluster":
            yield from _ray(manifest["spec"], name, namespace)
        case "RayService":
            yield from _ray(manifest["spec"]["rayClusterConfig"], name, namespace)
        case "RayJob":
            yield from _ray(manifest["spec"]["rayClusterSpec"], name, namespace)


def _ray(spec: dict[str, Any], name: str, namespace: str | None) -> Iterator[Object]:
    yield _pod(
        spec["headGroupSpec"]["template"], f"{name}-head", namespace, {"ray.io/node-type": "head", "ray.io/group": "headgroup"}
    )
    for group in spec["workerGroupSpecs"]:
        labels = {"ray.io/node-type": "worker", "ray.io/group": group["groupName"]}
        yield _pod(group["template"], f"{name}-{group['groupName']}", namespace, labels)


def _pod(template: dict[str, Any], name: str, namespace: str | None, labels: dict[str, str]) -> Object:
    metadata = template.get("metadata", {})
    given = metadata.get("labels", {})
    assert not any(label in given for label in RESERVED), f"{name}: KubeRay sets {RESERVED} itself"
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {**given, **labels},
            "annotations": metadata.get("annotations", {}),
        },
        "spec": copy.deepcopy(template["spec"]),
    }


def containers(pod: Object) -> list[dict[str, Any]]:
    """All containers, those of initialisation too."""
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
