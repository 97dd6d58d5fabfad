"""Rules that no CRD holds and only KubeRay's operator enforces, after `controllers/ray/utils/validation.go` of v1.7.0.

Each function yields what the operator would say. A resource that breaks one is accepted by the API server and then never becomes ready.
"""

import re
from collections.abc import Iterator
from typing import Any

from .charts import Object

Spec = dict[str, Any]
NAME_LIMITS = {"RayCluster": 53, "RayService": 47, "RayJob": 47, "RayCronJob": 36}
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
GATED = ("networkPolicy", "tlsOptions", "historyServerOptions")
SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")


def broken(manifest: Object) -> list[str]:
    """What the operator would refuse in a RayCluster, RayService or RayJob."""
    found = list(_name(manifest))
    match manifest["kind"]:
        case "RayCluster":
            found += _cluster(manifest["spec"], manifest["metadata"].get("annotations", {}), child=False)
        case "RayService":
            found += _service(manifest["spec"])
        case "RayJob":
            found += _job(manifest["spec"])
    return found


def _name(manifest: Object) -> Iterator[str]:
    name, limit = manifest["metadata"]["name"], NAME_LIMITS[manifest["kind"]]
    if len(name) > limit or not DNS_1035.fullmatch(name):
        yield f"name {name}: DNS-1035 and at most {limit} characters"


def _cluster(spec: Spec, annotations: dict[str, str], *, child: bool) -> Iterator[str]:
    head, workers = spec["headGroupSpec"], spec["workerGroupSpecs"]
    for group in (head, *workers):
        yield from _group(group)
    for worker in workers:
        yield from _bounds(worker)
    if len({worker["groupName"] for worker in workers}) != len(workers):
        yield "workerGroupSpecs: group names must differ"
    yield from _autoscaling(spec, [head, *workers])
    yield from _fault_tolerance(spec, annotations, head)
    yield from _authentication(spec, child=child)
    if child and "upgradeStrategy" in spec:
        yield "upgradeStrategy: not inside a RayJob or RayService"
    for field in GATED:
        if field in spec:
            yield f"{field}: its feature gate is off by default"


def _group(group: Spec) -> Iterator[str]:
    name = group.get("groupName", "head")
    containers = group["template"]["spec"].get("containers", [])
    if not containers:
        yield f"{name}: at least one container"
    elif not containers[0]["name"].startswith("ray-"):
        yield f"{name}: Ray's container must be the first"
    if group.get("resources") or group.get("labels"):
        for key in ("num-cpus", "num-gpus", "memory", "resources", "labels"):
            if key in group["rayStartParams"]:
                yield f"{name}: resources or labels of the group exclude rayStartParams.{key}"


def _bounds(worker: Spec) -> Iterator[str]:
    low, high = worker["minReplicas"], worker["maxReplicas"]
    if low < 0 or high < 0 or low > high:
        yield f"{worker['groupName']}: minReplicas {low}, maxReplicas {high}"
    if worker.get("idleTimeoutSeconds", 0) < 0:
        yield f"{worker['groupName']}: idleTimeoutSeconds is negative"


def _autoscaling(spec: Spec, groups: list[Spec]) -> Iterator[str]:
    on = spec.get("enableInTreeAutoscaling", False)
    if on and spec.get("autoscalerOptions", {}).get("version") == "v2":
        for group in groups:
            if group["template"]["spec"].get("restartPolicy", "Never") != "Never":
                yield f"{group.get('groupName', 'head')}: restartPolicy must be Never with autoscaler v2"
    if "RAY_enable_autoscaler_v2" in _environment(groups[0]):
        yield "RAY_enable_autoscaler_v2: use autoscalerOptions.version"


def _fault_tolerance(spec: Spec, annotations: dict[str, str], head: Spec) -> Iterator[str]:
    names = _environment(head)
    options = spec.get("gcsFaultToleranceOptions")
    if options is None:
        if "RAY_REDIS_ADDRESS" in names and annotations.get("ray.io/ft-enabled") != "true":
            yield "RAY_REDIS_ADDRESS without gcsFaultToleranceOptions"
        return
    if "ray.io/ft-enabled" in annotations or "ray.io/external-storage-namespace" in annotations:
        yield "gcsFaultToleranceOptions: not together with its annotations"
    for name in ("REDIS_PASSWORD", "RAY_REDIS_ADDRESS"):
        if name in names:
            yield f"gcsFaultToleranceOptions: not together with {name}"
    if "redis-password" in head["rayStartParams"]:
        yield "gcsFaultToleranceOptions: not together with rayStartParams.redis-password"
    if options.get("backend", "redis") == "rocksdb":
        yield "gcsFaultToleranceOptions.backend rocksdb: its feature gate is off by default"
    if "storage" in options and options.get("backend") != "rocksdb":
        yield "gcsFaultToleranceOptions.storage: only with rocksdb"


def _authentication(spec: Spec, *, child: bool) -> Iterator[str]:
    options = spec.get("authOptions", {})
    version = tuple(int(part) for part in spec.get("rayVersion", "0.0.0").split("."))
    if options.get("mode") == "token" and version < (2, 52, 0):
        yield "authOptions.mode token: rayVersion 2.52.0 or newer"
    if options.get("enableK8sTokenAuth"):
        if child:
            yield "authOptions.enableK8sTokenAuth: not in a RayJob or RayService"
        if version < (2, 55, 0) or "secretName" in options:
            yield "authOptions.enableK8sTokenAuth: Ray 2.55.0, and no secretName"


def _service(spec: Spec) -> Iterator[str]:
    yield from _cluster(spec["rayClusterConfig"], {}, child=True)
    if spec["rayClusterConfig"]["headGroupSpec"].get("headService", {}).get("metadata", {}).get("name"):
        yield "headService.name must not be set"
    strategy = spec.get("upgradeStrategy", {})
    kind = strategy.get("type", "NewCluster")
    if kind not in ("NewCluster", "NewClusterWithIncrementalUpgrade", "None"):
        yield f"upgradeStrategy.type {kind}"
    if kind == "NewClusterWithIncrementalUpgrade":
        yield from _incremental(spec, strategy.get("clusterUpgradeOptions"))
    if spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
        yield "rayClusterDeletionDelaySeconds is negative"


def _incremental(spec: Spec, options: Spec | None) -> Iterator[str]:
    if not spec["rayClusterConfig"].get("enableInTreeAutoscaling"):
        yield "an incremental upgrade needs enableInTreeAutoscaling"
    if options is None:
        yield "an incremental upgrade needs clusterUpgradeOptions"
    elif (
        not options["gatewayClassName"]
        or options["stepSizePercent"] > options.get("maxSurgePercent", 100)
        or options["intervalSeconds"] <= 0
    ):
        yield "clusterUpgradeOptions: a class, a step of at most the surge, and an interval above 0"


def _job(spec: Spec) -> Iterator[str]:
    cluster = spec.get("rayClusterSpec")
    if (cluster is None) == ("clusterSelector" not in spec):
        yield "one of rayClusterSpec and clusterSelector"
    if cluster is not None:
        yield from _cluster(cluster, {}, child=True)
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode not in SUBMISSION_MODES:
        yield f"submissionMode {mode}: one of {', '.join(SUBMISSION_MODES)}"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if spec.get("backoffLimit", 0) > 0 and (mode == "InteractiveMode" or "clusterSelector" in spec):
        yield "backoffLimit: not with InteractiveMode or clusterSelector"
    if mode == "SidecarMode" and any(key in spec for key in ("clusterSelector", "submitterPodTemplate", "submitterConfig")):
        yield "SidecarMode excludes clusterSelector, submitterPodTemplate and submitterConfig"
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if key in spec and spec[key] <= 0:
            yield f"{key} must be above 0"


def _environment(group: Spec) -> set[str]:
    containers = group["template"]["spec"].get("containers", [])
    return {variable["name"] for variable in containers[0].get("env", [])} if containers else set()
