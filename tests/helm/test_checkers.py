"""The checkers themselves: each knows a wrong object when it sees one."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from support import charts, crds, operator_rules
from support.charts import Object


def test_the_crd_files_are_upstreams(crd_folder: Path) -> None:
    """Digests of the files as upstream published them: a changed copy would test something else."""
    pinned = json.loads((Path(__file__).parent / "crds.json").read_text())
    assert {path.relative_to(crd_folder).as_posix() for path in crd_folder.rglob("*.yaml")} == pinned.keys()
    for name, source in pinned.items():
        assert hashlib.sha256((crd_folder / name).read_bytes()).hexdigest() == source["sha256"], name


@pytest.fixture(scope="module")
def cluster(chart: Path, helm4: charts.Helm4) -> Object:
    """A RayCluster that everybody accepts."""
    return charts.ray_cluster(helm4.template(chart, {}))


@pytest.fixture(scope="module")
def service(chart: Path, helm4: charts.Helm4) -> Object:
    """A RayService that everybody accepts."""
    return charts.of_kind(helm4.template(chart, {}), "RayService")[0]


def _changed(manifest: Object, path: str, value: Any) -> Object:
    """A copy with one field set; `path` like `spec.workerGroupSpecs.0.replicas`."""
    result = copy.deepcopy(manifest)
    place: Any = result
    *parents, last = path.split(".")
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
    place[int(last) if isinstance(place, list) else last] = value
    return result


SERVER = [
    ("spec.enableInTreeAutoscalling", True, "enableInTreeAutoscalling"),
    ("spec.workerGroupSpecs.0.replicas", "3", ".spec.workerGroupSpecs[0].replicas"),
    ("spec.headGroupSpec.rayStartParams.num-cpus", 0, "num-cpus"),
    ("spec.authOptions.mode", "tokens", ".spec.authOptions.mode"),
    ("spec.autoscalerOptions.version", "v3", ".spec.autoscalerOptions.version"),
    ("spec.managedBy", "somebody", "managedBy"),
    ("spec.headGroupSpec.template.spec.containers.0.imagePulPolicy", "Always", "imagePulPolicy"),
]


@pytest.mark.parametrize(("path", "value", "said"), SERVER, ids=[path for path, _, _ in SERVER])
def test_the_server_would_refuse(crd_folder: Path, cluster: Object, path: str, value: Any, said: str) -> None:
    (problem, *_) = crds.kuberay("1.7.0").problems(_changed(cluster, path, value))
    assert said in problem


def test_a_field_of_a_newer_kuberay_is_unknown_to_an_older_one(crd_folder: Path, cluster: Object) -> None:
    named = _changed(cluster, "spec.authOptions.secretName", "token")
    assert "secretName" in crds.kuberay("1.5.1").problems(named)[0]
    assert crds.kuberay("1.6.2").problems(named) == []


def test_defaults_are_filled_in_before_checking(crd_folder: Path, cluster: Object) -> None:
    """KubeRay's kinds require minReplicas and give it a default: a group without one is valid."""
    without = copy.deepcopy(cluster)
    del without["spec"]["workerGroupSpecs"][0]["minReplicas"]
    kuberay = crds.kuberay("1.7.0")
    assert kuberay.problems(without) == []
    assert kuberay.defaulted(without)["spec"]["workerGroupSpecs"][0]["minReplicas"] == 0


OPERATOR = [
    ("metadata.name", "x" * 54, "at most 53"),
    ("metadata.name", "7b", "DNS-1035"),
    ("spec.headGroupSpec.template.spec.containers", [], "at least one container"),
    ("spec.workerGroupSpecs.0.template.spec.containers.0.name", "sidecar", "must be the first"),
    ("spec.workerGroupSpecs.0.minReplicas", 99, "minReplicas 99"),
    ("spec.workerGroupSpecs.0.idleTimeoutSeconds", -1, "negative"),
    ("spec.workerGroupSpecs.0.resources", {"CPU": "1"}, "exclude rayStartParams.resources"),
    ("spec.workerGroupSpecs.0.template.spec.restartPolicy", "Always", "restartPolicy must be Never"),
    (
        "spec.headGroupSpec.template.spec.containers.0.env",
        [{"name": "RAY_enable_autoscaler_v2"}],
        "use autoscalerOptions.version",
    ),
    ("spec.headGroupSpec.template.spec.containers.0.env", [{"name": "RAY_REDIS_ADDRESS"}], "without gcsFaultToleranceOptions"),
    ("spec.gcsFaultToleranceOptions", {"redisAddress": "r:1", "storage": {}}, "only with rocksdb"),
    ("spec.gcsFaultToleranceOptions", {"backend": "rocksdb"}, "feature gate"),
    ("spec.rayVersion", "2.51.0", "2.52.0 or newer"),
    ("spec.authOptions", {"mode": "token", "enableK8sTokenAuth": True, "secretName": "x"}, "no secretName"),
    ("spec.networkPolicy", {}, "feature gate"),
]


@pytest.mark.parametrize(("path", "value", "said"), OPERATOR, ids=[f"{path}-{said}" for path, _, said in OPERATOR])
def test_the_operator_would_refuse(cluster: Object, path: str, value: Any, said: str) -> None:
    assert operator_rules.broken(cluster) == []
    assert any(said in problem for problem in operator_rules.broken(_changed(cluster, path, value)))


SERVICE = [
    ("metadata.name", "x" * 48, "at most 47"),
    ("spec.upgradeStrategy.type", "Rolling", "upgradeStrategy.type Rolling"),
    ("spec.upgradeStrategy.type", "NewClusterWithIncrementalUpgrade", "needs clusterUpgradeOptions"),
    ("spec.rayClusterConfig.upgradeStrategy", {"type": "None"}, "not inside a RayJob or RayService"),
    ("spec.rayClusterConfig.headGroupSpec.headService", {"metadata": {"name": "mine"}}, "headService.name"),
    ("spec.rayClusterConfig.authOptions", {"mode": "token", "enableK8sTokenAuth": True}, "not in a RayJob or RayService"),
    ("spec.rayClusterDeletionDelaySeconds", -1, "negative"),
]


@pytest.mark.parametrize(("path", "value", "said"), SERVICE, ids=[f"{path}-{said}" for path, _, said in SERVICE])
def test_the_operator_would_refuse_a_service(service: Object, path: str, value: Any, said: str) -> None:
    assert operator_rules.broken(service) == []
    assert any(said in problem for problem in operator_rules.broken(_changed(service, path, value)))


JOBS = [
    ({}, "one of rayClusterSpec and clusterSelector"),
    ({"submissionMode": "K9sJobMode"}, "submissionMode K9sJobMode"),
    ({"ttlSecondsAfterFinished": 60}, "needs shutdownAfterJobFinishes"),
    ({"backoffLimit": 1, "clusterSelector": {"ray.io/cluster": "x"}}, "not with InteractiveMode or clusterSelector"),
    ({"submissionMode": "SidecarMode", "submitterConfig": {}}, "SidecarMode excludes"),
    ({"activeDeadlineSeconds": 0}, "activeDeadlineSeconds must be above 0"),
]


@pytest.mark.parametrize(("spec", "said"), JOBS, ids=[said for _, said in JOBS])
def test_the_operator_would_refuse_a_job(cluster: Object, spec: dict[str, Any], said: str) -> None:
    job = {"kind": "RayJob", "metadata": {"name": "tune"}, "spec": {"entrypoint": "python x.py", **spec}}
    assert any(said in problem for problem in operator_rules.broken(job))
