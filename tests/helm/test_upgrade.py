"""An autoscaled jobs cluster lives through upgrades: real Helm 3 and 4, the real patches of Ray's autoscaler, our real hook; the API server is a fake."""

import json
import runpy
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler._private.kuberay.node_provider import IKubernetesHttpApiClient
from ray.autoscaler.v2.instance_manager.cloud_providers.kuberay.cloud_provider import KubeRayProvider
from support import charts, fake_kubernetes, releases
from support.charts import Object, Values, merged
from support.fake_kubernetes import Cluster

JOBS = "trial-altiplano-jobs"
# Helm 3 asks at most five times a second: objects that these stories do not need stay out.
SMALL: Values = {
    "mlflow": {"enabled": False},
    "endpoint": {"enabled": False},
    "networkPolicy": {"enabled": False},
    "storage": {"workspace": {"enabled": False}},
}
SCRIPT = runpy.run_path(str(charts.CHART / "files" / "apply_raycluster.py"), run_name="apply_raycluster")
Api: Any = SCRIPT["Api"]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A fresh stand-in of a cluster."""
    with fake_kubernetes.serving() as cluster:
        yield cluster


@pytest.fixture(params=["helm3", "helm4"])
def release(request: pytest.FixtureRequest, chart: Path, cluster: Cluster, tmp_path: Path) -> releases.Releases:
    """A release by one of the Helms."""
    if request.param == "helm4":
        return releases.Releases4(chart, cluster)
    return releases.Releases3(chart, cluster, request.getfixturevalue("helm3"), tmp_path)


class Autoscaler(IKubernetesHttpApiClient):  # type: ignore[misc]  # Ray ships no types
    """Ray's own autoscaler provider; only the way to the server is ours: plain HTTP without a service account."""

    def __init__(self, cluster: Cluster) -> None:
        self._base = f"{cluster.url}/apis/ray.io/v1/namespaces/{charts.NAMESPACE}/"
        self._pods = f"{cluster.url}/api/v1/namespaces/{charts.NAMESPACE}/"

    def add(self, group: str, pods: int) -> None:
        """Launch more pods of a group, as for tasks that found no place."""
        provider = KubeRayProvider(
            JOBS, {"namespace": charts.NAMESPACE, "head_node_type": "headgroup"}, gcs_client=None, k8s_api_client=self
        )
        provider.launch({group: pods}, request_id=f"{group}-{pods}")
        assert provider.poll_errors() == []

    def get(self, path: str) -> dict[str, Any]:
        base = self._pods if path.startswith("pods") else self._base
        with urllib.request.urlopen(base + path, timeout=120) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def patch(self, path: str, payload: Any, content_type: str = "application/json-patch+json") -> dict[str, Any]:
        # The name that the real client's library gives itself.
        headers = {"Content-Type": content_type, "User-Agent": "python-requests/2.32"}
        request = urllib.request.Request(self._base + path, json.dumps(payload).encode(), headers, method="PATCH")
        with urllib.request.urlopen(request, timeout=120) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def delete(self, path: str) -> dict[str, Any]:
        raise AssertionError(f"the autoscaler deletes nothing here: {path}")


def _group(cluster: Cluster, name: str) -> Object:
    groups: list[Object] = cluster.get("rayclusters", JOBS)["spec"]["workerGroupSpecs"]
    return next(group for group in groups if group["groupName"] == name)


def _image(group: Object) -> str:
    image: str = group["template"]["spec"]["containers"][0]["image"]
    return image


def test_an_upgrade_keeps_what_the_autoscaler_set(release: releases.Releases, cluster: Cluster) -> None:
    release.install(SMALL)
    assert _group(cluster, "training")["replicas"] == 0
    Autoscaler(cluster).add("training", 3)
    assert _group(cluster, "training")["replicas"] == 3

    release.upgrade(
        merged(
            SMALL,
            {
                "image": {"tag": "0.1.1"},
                "rayCluster": {"workerGroups": {"training": {"maxReplicas": 8}, "preprocessing": {"minReplicas": 1}}},
            },
        )
    )

    assert _group(cluster, "training")["replicas"] == 3
    assert _group(cluster, "training")["maxReplicas"] == 8
    assert _group(cluster, "preprocessing")["replicas"] == 1, "raised to the new minimum"
    assert _image(_group(cluster, "training")) == "altiplano:0.1.1"
    assert "replicas inference=0, preprocessing=1, training=3" in cluster.job_logs[-1]

    Autoscaler(cluster).add("training", 4)
    assert _group(cluster, "training")["replicas"] == 7
    release.upgrade(merged(SMALL, {"image": {"tag": "0.1.2"}}))
    assert _group(cluster, "training")["replicas"] == 4, "lowered to the chart's maximum"


def test_a_rollback_keeps_it_too(release: releases.Releases, cluster: Cluster) -> None:
    release.install(SMALL)
    release.upgrade(merged(SMALL, {"image": {"tag": "0.1.1"}}))
    Autoscaler(cluster).add("training", 2)
    release.rollback()
    assert _group(cluster, "training")["replicas"] == 2
    assert _image(_group(cluster, "training")) == "altiplano:0.1.0"


def test_an_uninstall_takes_the_cluster_with_it(release: releases.Releases, cluster: Cluster) -> None:
    release.install(SMALL)
    assert ("rayclusters", JOBS) in cluster.objects
    release.uninstall()
    left = {kind for kind, _ in cluster.objects}
    assert "rayclusters" not in left
    assert left <= {"persistentvolumeclaims", "jobs"}, "volumes are kept on purpose"


def test_disabling_the_cluster_takes_it_down(release: releases.Releases, cluster: Cluster) -> None:
    release.install(merged(SMALL, {"mlflow": {"enabled": True}}))
    release.upgrade(merged(SMALL, {"mlflow": {"enabled": True}, "rayCluster": {"enabled": False}}))
    assert ("rayclusters", JOBS) not in cluster.objects
    assert ("deployments", "trial-altiplano-mlflow") in cluster.objects


OWNED = merged(SMALL, {"rayCluster": {"apply": "helm"}})


def test_without_the_hook_helm_4_is_refused(chart: Path, cluster: Cluster) -> None:
    """Why the hook is there: the complaint of a real API server, by Helm 4.2.3 and KubeRay 1.7.0's kinds, in the same words."""
    release = releases.Releases4(chart, cluster)
    release.install(OWNED)
    Autoscaler(cluster).add("training", 3)
    with pytest.raises(charts.RefusedError, match=r'conflict with "python-requests" using ray.io/v1: .spec.workerGroupSpecs'):
        release.upgrade(OWNED | {"image": {"tag": "0.1.1"}})


def test_without_the_hook_helm_3_sets_counts_back(chart: Path, cluster: Cluster, helm3: charts.Helm3, tmp_path: Path) -> None:
    release = releases.Releases3(chart, cluster, helm3, tmp_path)
    release.install(OWNED)
    Autoscaler(cluster).add("training", 3)
    release.upgrade(OWNED | {"image": {"tag": "0.1.1"}})
    assert _group(cluster, "training")["replicas"] == 0


def test_an_upgrade_of_the_endpoint_needs_no_hook(chart: Path, cluster: Cluster) -> None:
    """The autoscaler patches the operator's child cluster, never our RayService."""
    release = releases.Releases4(chart, cluster)
    release.install({})
    release.upgrade({"endpoint": {"adapters": {"orders": "/workspace/orders"}}})
    assert "orders: /workspace/orders" in cluster.get("rayservices", "trial-altiplano-endpoint")["spec"]["serveConfigV2"]


def _wanted(replicas: int = 0, low: int = 0, high: int = 4, scales: bool = True) -> Object:
    group = {"groupName": "training", "replicas": replicas, "minReplicas": low, "maxReplicas": high}
    metadata = {"name": JOBS, "namespace": charts.NAMESPACE}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": metadata,
        "spec": {"enableInTreeAutoscaling": scales, "workerGroupSpecs": [group]},
    }


@pytest.mark.parametrize(
    ("wanted", "live", "kept"),
    [
        (_wanted(), 3, 3),
        (_wanted(high=2), 3, 2),
        (_wanted(low=4), 3, 4),
        (_wanted(replicas=1, scales=False), 3, 1),
    ],
    ids=["kept", "lowered to the new maximum", "raised to the new minimum", "without autoscaling the chart decides"],
)
def test_counts_stay_within_the_wanted_bounds(wanted: Object, live: int, kept: int) -> None:
    result = SCRIPT["with_live_counts"](wanted, _wanted(replicas=live))
    assert result["spec"]["workerGroupSpecs"][0]["replicas"] == kept


def test_pods_marked_for_removal_stay_marked() -> None:
    live = _wanted(replicas=2)
    live["spec"]["workerGroupSpecs"][0]["scaleStrategy"] = {"workersToDelete": ["training-worker-x"]}
    assert SCRIPT["with_live_counts"](_wanted(), live)["spec"]["workerGroupSpecs"][0]["scaleStrategy"] == {
        "workersToDelete": ["training-worker-x"]
    }


def test_a_new_group_starts_with_the_charts_count() -> None:
    wanted = _wanted(replicas=1)
    wanted["spec"]["workerGroupSpecs"].append({"groupName": "big", "replicas": 2, "minReplicas": 2, "maxReplicas": 2})
    assert [
        group["replicas"] for group in SCRIPT["with_live_counts"](wanted, _wanted(replicas=3))["spec"]["workerGroupSpecs"]
    ] == [3, 2]


def _cluster_with(cluster: Cluster, raycluster: Object) -> None:
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": JOBS, "namespace": charts.NAMESPACE}, "data": {}}
    cluster.create(("configmaps", JOBS), owner, "helm")
    cluster.create(("rayclusters", JOBS), raycluster, "altiplano-chart")


def test_the_autoscaler_may_be_faster(cluster: Cluster) -> None:
    """It patches between our read and our write: we read again, and its count is kept."""
    _cluster_with(cluster, _wanted(replicas=1))
    scaled: list[bool] = []

    class Racing(Api):  # type: ignore[misc]  # a class of a script
        def apply(self, path: str, body: Object) -> Object:
            if not scaled:
                scaled.append(True)
                Autoscaler(cluster).add("training", 1)
            answer: Object = super().apply(path, body)
            return answer

    SCRIPT["apply"](Racing(cluster.url, "", None), _wanted(replicas=0), JOBS)
    assert _group(cluster, "training")["replicas"] == 2


def test_a_cluster_that_never_rests_ends_with_advice(cluster: Cluster) -> None:
    _cluster_with(cluster, _wanted(replicas=1))

    class Restless(Api):  # type: ignore[misc]  # a class of a script
        def apply(self, path: str, body: Object) -> Object:
            raycluster = cluster.get("rayclusters", JOBS)
            cluster.update(
                ("rayclusters", JOBS), {**raycluster, "metadata": {**raycluster["metadata"], "resourceVersion": ""}}, "somebody"
            )
            answer: Object = super().apply(path, body)
            return answer

    with pytest.raises(SCRIPT["ApplyError"], match="run the upgrade again"):
        SCRIPT["apply"](Restless(cluster.url, "", None), _wanted(), JOBS, pause_s=0)


def test_a_cluster_without_kuberay_ends_with_advice(cluster: Cluster) -> None:
    with pytest.raises(SCRIPT["ApplyError"], match=r"install KubeRay 1\.5\.1 or newer"):
        SCRIPT["apply"](Api(cluster.url + "/nowhere", "", None), _wanted(), JOBS)
