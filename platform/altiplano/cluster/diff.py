"""What a change of an object does to what runs: in place, rolling, or from the beginning. Said before anything is applied."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import yaml

from altiplano.cluster.kube import Object

# Elements of lists are found by these, in this order.
_KEYS = ("name", "groupName", "mountPath", "containerPort", "key")
# Written by the server and by tools.
_NOT_OURS = ("status",)
_METADATA = ("labels", "annotations")


class Effect(StrEnum):
    """From the mildest to the hardest."""

    created = "created"
    in_place = "in place"
    new_pods = "new pods only"
    not_taken = "not taken"
    rolls = "rolls the replicas"
    restarts = "restarts"
    new_cluster = "new cluster"
    removed = "removed"


MEANING = {
    Effect.created: "was not there before",
    Effect.in_place: "nothing restarts",
    Effect.new_pods: "running pods stay as they are until they end",
    Effect.not_taken: "stored, but what runs does not read it",
    Effect.rolls: "Serve replaces its replicas, each after its answers are done; the model loads again",
    Effect.restarts: "its pods end and start again",
    Effect.new_cluster: "a second cluster starts and takes over, then the first goes: its GPUs twice for that time",
    Effect.removed: "is deleted",
}


@dataclass(frozen=True)
class Change:
    """One field. `before` and `after` None: it is not there."""

    path: str
    before: Any
    after: Any
    effect: Effect


@dataclass(frozen=True)
class Plan:
    """The changes of one object; none when it is already as wanted."""

    kind: str
    name: str
    changes: tuple[Change, ...]

    @property
    def effects(self) -> list[Effect]:
        """Each effect once, the mildest first."""
        found = {change.effect for change in self.changes}
        return [effect for effect in Effect if effect in found]


def plan(before: Object | None, after: Object | None) -> Plan:
    """From `before` to `after`; None: not there."""
    present = after or before
    assert present is not None
    kind, name = present["kind"], present["metadata"]["name"]
    if before is None:
        return Plan(kind, name, (Change("", None, kind, Effect.created),))
    if after is None:
        return Plan(kind, name, (Change("", kind, None, Effect.removed),))
    return Plan(kind, name, tuple(_changes(kind, _comparable(before), _comparable(after))))


def plan_all(before: list[Object], after: list[Object]) -> list[Plan]:
    """The objects of two releases, those without changes left out."""
    old, new = ({(o["kind"], o["metadata"]["name"]): o for o in objects} for objects in (before, after))
    plans = [plan(old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys())]
    return [one for one in plans if one.changes]


def _comparable(manifest: Object) -> Object:
    metadata = {key: manifest["metadata"].get(key) or {} for key in _METADATA}
    return {key: value for key, value in manifest.items() if key not in (*_NOT_OURS, "metadata")} | {"metadata": metadata}


def _changes(kind: str, before: Object, after: Object) -> Iterator[Change]:
    if kind == "RayService":
        yield from _ray_service(before, after)
    elif kind == "RayCluster":
        yield from _ray_cluster(before, after)
    elif kind == "ConfigMap" and "raycluster.json" in after.get("data", {}):
        yield from _hook(before, after)
    else:
        hard = kind in ("Deployment", "StatefulSet", "DaemonSet")
        for path, old, new in leaves(before, after):
            yield Change(path, old, new, Effect.restarts if hard and path.startswith("spec.template.") else Effect.in_place)


def _ray_service(before: Object, after: Object) -> Iterator[Change]:
    texts = [manifest["spec"].get("serveConfigV2", "") for manifest in (before, after)]
    yield from serve_changes(*(yaml.safe_load(text) or {} for text in texts))
    strategy = after["spec"].get("upgradeStrategy", {}).get("type", "NewCluster")
    hard = Effect.not_taken if strategy == "None" else Effect.new_cluster
    old_groups, new_groups = (
        [group["groupName"] for group in manifest["spec"]["rayClusterConfig"].get("workerGroupSpecs", [])]
        for manifest in (before, after)
    )
    # KubeRay compares group by group: a new one is taken in place only behind the others.
    appended = new_groups[: len(old_groups)] == old_groups
    for path, old, new in leaves(before, after):
        if path == "spec.serveConfigV2":
            continue
        of_cluster = path.startswith("spec.rayClusterConfig.")
        easy = _scales_only(path) or (appended and _is_new_group(path, old))
        yield Change(path, old, new, hard if of_cluster and not easy else Effect.in_place)


def _ray_cluster(before: Object, after: Object) -> Iterator[Change]:
    recreate = after["spec"].get("upgradeStrategy", {}).get("type") == "Recreate"
    for path, old, new in leaves(before, after):
        of_cluster = path.startswith("spec.") and not (_scales_only(path) or _is_new_group(path, old))
        yield Change(path, old, new, (Effect.restarts if recreate else Effect.new_pods) if of_cluster else Effect.in_place)


def _hook(before: Object, after: Object) -> Iterator[Change]:
    """The chart's RayCluster travels in a ConfigMap; a job of the release applies it with the live counts."""
    clusters = [json.loads(manifest.get("data", {}).get("raycluster.json") or "{}") for manifest in (before, after)]
    if clusters[0]:
        yield from _changes("RayCluster", *(_comparable(cluster) for cluster in clusters))
    else:
        yield Change("", None, "RayCluster", Effect.created)


def _scales_only(path: str) -> bool:
    """Counts and bounds: KubeRay takes these into the running cluster."""
    return _in_group(path).startswith(("replicas", "minReplicas", "maxReplicas", "scaleStrategy"))


def _is_new_group(path: str, before: Any) -> bool:
    return (
        before is None
        and path.endswith("]")
        and "." not in path.rpartition(".workerGroupSpecs[")[2]
        and ".workerGroupSpecs[" in path
    )


def _in_group(path: str) -> str:
    """The path below a worker group; empty outside of one."""
    _, _, rest = path.partition(".workerGroupSpecs[")
    return rest.partition("].")[2]


# --- Ray Serve ---

# Options that Serve gives to running replicas (DeploymentOptionUpdateType in Ray; a test compares); all others replace them.
SERVE_IN_PLACE = frozenset(
    {
        "autoscaling_config",
        "backpressure_config",
        "graceful_shutdown_timeout_s",
        "graceful_shutdown_wait_loop_s",
        "health_check_period_s",
        "health_check_timeout_s",
        "logging_config",
        "max_constructor_retry_count",
        "max_ongoing_requests",
        "max_queued_requests",
        "max_surge_percent",
        "num_replicas",
        "request_router_config",
        "rolling_update_percentage",
        "user_config",
    }
)
# Read when Serve starts, and then not again.
_SERVE_START = ("proxy_location", "http_options", "grpc_options", "controller_options")


def serve_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Change]:
    """The changes between two Serve configs, with what Serve does about each."""
    for path, old, new in leaves(before, after):
        yield Change(f"serve.{path}", old, new, _serve_effect(path, old, new))


def _serve_effect(path: str, old: Any, new: Any) -> Effect:
    if path.startswith(_SERVE_START):
        return Effect.not_taken
    _, _, deployment = path.partition(".deployments[")
    if deployment:
        option = deployment.partition("].")[2].split(".")[0].split("[")[0]
        if option:
            return Effect.in_place if option in SERVE_IN_PLACE else Effect.rolls
    elif path.startswith("applications[") and not path.endswith("]"):
        return Effect.in_place if path.endswith(".route_prefix") else Effect.rolls
    return Effect.created if old is None else Effect.removed if new is None else Effect.in_place


# --- comparing ---


def leaves(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The fields in which two JSON values differ: path, before, after. Elements of lists are found by their name where they have one."""
    if before == after:
        return
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in [*before, *(key for key in after if key not in before)]:
            yield from leaves(before.get(key), after.get(key), f"{path}.{key}" if path else str(key))
        return
    named = _by_name(before), _by_name(after)
    if named[0] is not None and named[1] is not None:
        for key in [*named[0], *(key for key in named[1] if key not in named[0])]:
            yield from leaves(named[0].get(key), named[1].get(key), f"{path}[{key}]")
        return
    yield path, before, after


def _by_name(value: Any) -> dict[Any, Any] | None:
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        return None
    for name in _KEYS:
        names = [entry.get(name) for entry in value]
        if value and all(key is not None for key in names) and len(set(names)) == len(names):
            return dict(zip(names, value, strict=True))
    return None if value else {}
