"""Who reaches whom: every pair of pods of a release, and strangers."""

from pathlib import Path

import pytest
from support import charts, network, pods
from support.charts import Object, merged
from support.matrix import MATRIX, MONITORING, OUTSIDE

STRANGER: Object = {"metadata": {"namespace": "elsewhere", "labels": {"app": "stranger"}}}
NEIGHBOUR: Object = {"metadata": {"namespace": charts.NAMESPACE, "labels": {"app": "neighbour"}}}
OPERATOR: Object = {"metadata": {"namespace": "kuberay", "labels": {"app.kubernetes.io/name": "kuberay-operator"}}}
PROMETHEUS: Object = {"metadata": {"namespace": "monitoring", "labels": {"app.kubernetes.io/name": "prometheus"}}}
COLLECTOR: Object = {"metadata": {"namespace": "monitoring", "labels": {"app": "otel-collector"}}}
SUBMITTER: Object = {"metadata": {"namespace": charts.NAMESPACE, "labels": {"altiplano.io/jobs-client": "true"}}}


class Release:
    """The pods and policies of a release, by short names."""

    def __init__(self, objects: list[Object]) -> None:
        self.policies = charts.of_kind(objects, "NetworkPolicy")
        self.pods = {
            pod["metadata"]["name"].removeprefix("trial-altiplano-"): pod
            for pod in pods.pods([*objects, charts.ray_cluster(objects)])
        }
        self.pods |= {
            "stranger": STRANGER,
            "neighbour": NEIGHBOUR,
            "operator": OPERATOR,
            "prometheus": PROMETHEUS,
            "collector": COLLECTOR,
            "submitter": SUBMITTER,
        }

    def allows(self, source: str, target: str, port: int) -> bool:
        """Whether one reaches the other."""
        return network.allows(self.policies, self.pods[source], self.pods[target], port)


@pytest.fixture(scope="module")
def release(chart: Path, helm4: charts.Helm4) -> Release:
    """A release with everything in the cluster."""
    tracing = {"endpoint": {"otlpEndpoint": "http://collector.monitoring:4318"}}
    return Release(helm4.template(chart, merged(MONITORING, tracing, {"backup": {"enabled": True}})))


OPEN = [
    ("jobs-training", "jobs-head", 6379),
    ("jobs-head", "jobs-preprocessing", 30123),
    ("jobs-training", "jobs-training", 40000),
    ("jobs-training", "mlflow", 5000),
    ("jobs-head", "endpoint-endpoint", 8000),
    ("jobs-head", "endpoint-head", 8265),
    ("endpoint-head", "redis", 6379),
    ("endpoint-endpoint", "endpoint-head", 6379),
    ("endpoint-head", "mlflow", 5000),
    ("mlflow", "postgres", 5432),
    ("backup", "postgres", 5432),
    ("submitter", "jobs-head", 8265),
    ("operator", "jobs-head", 8265),
    ("operator", "endpoint-head", 8265),
    ("operator", "endpoint-endpoint", 8000),
    ("stranger", "endpoint-endpoint", 8000),
    ("prometheus", "jobs-training", 8080),
    ("prometheus", "jobs-head", 44217),
    ("prometheus", "endpoint-endpoint", 9464),
    ("endpoint-endpoint", "collector", 4318),
    ("endpoint-head", "prometheus", 9090),
    ("jobs-head", "prometheus", 9090),
    ("test", "mlflow", 5000),
    ("test", "jobs-head", 8265),
    ("test", "endpoint-endpoint", 8000),
]
CLOSED = [
    # Ray's control plane and HAProxy's open ports: whoever reaches them runs code or reads statistics.
    ("stranger", "jobs-head", 8265),
    ("stranger", "jobs-head", 10001),
    ("stranger", "jobs-head", 6379),
    ("neighbour", "jobs-head", 8265),
    ("stranger", "endpoint-head", 8265),
    ("stranger", "endpoint-endpoint", 8404),
    ("stranger", "endpoint-endpoint", 9101),
    ("stranger", "endpoint-endpoint", 30000),
    ("submitter", "jobs-head", 6379),
    ("submitter", "endpoint-head", 8265),
    ("endpoint-endpoint", "jobs-head", 8265),
    ("endpoint-endpoint", "postgres", 5432),
    ("jobs-training", "postgres", 5432),
    ("jobs-training", "endpoint-head", 6379),
    ("stranger", "mlflow", 5000),
    ("stranger", "redis", 6379),
    ("neighbour", "redis", 6379),
    ("neighbour", "postgres", 5432),
    ("prometheus", "postgres", 5432),
    ("prometheus", "jobs-head", 8265),
    ("stranger", "endpoint-endpoint", 9464),
    ("neighbour", "endpoint-endpoint", 9464),
    ("jobs-training", "collector", 4318),
    ("endpoint-endpoint", "collector", 22),
    ("mlflow", "jobs-head", 8265),
    ("redis", "postgres", 5432),
    ("test", "postgres", 5432),
    ("operator", "postgres", 5432),
]


@pytest.mark.parametrize(("source", "target", "port"), OPEN)
def test_what_must_work_is_open(release: Release, source: str, target: str, port: int) -> None:
    assert release.allows(source, target, port)


@pytest.mark.parametrize(("source", "target", "port"), CLOSED)
def test_what_nobody_needs_is_closed(release: Release, source: str, target: str, port: int) -> None:
    assert not release.allows(source, target, port)


def test_only_heads_and_the_hook_reach_the_kubernetes_api(release: Release) -> None:
    reaching = {
        name
        for name, pod in release.pods.items()
        if name not in ("stranger", "neighbour", "operator", "prometheus", "collector", "submitter")
        and network.allows_out(release.policies, pod, 6443)
    }
    assert reaching == {"jobs-head", "endpoint-head", "jobs-apply"}


def test_databases_and_tests_have_no_way_out(release: Release) -> None:
    for name in ("postgres", "redis", "backup", "test", "mlflow"):
        assert not network.allows_out(release.policies, release.pods[name], 443), name


def test_without_autoscaling_and_hub_nothing_leaves_but_the_hook(chart: Path, helm4: charts.Helm4) -> None:
    release = Release(helm4.template(chart, MATRIX["air-gap"]))
    assert not network.allows_out(release.policies, release.pods["jobs-training"], 443)


def test_an_outside_database_and_store_are_reached(chart: Path, helm4: charts.Helm4) -> None:
    release = Release(helm4.template(chart, OUTSIDE))
    assert network.allows_out(release.policies, release.pods["mlflow"], 5432)
    assert network.allows_out(release.policies, release.pods["mlflow"], 443)
    assert not network.allows_out(release.policies, release.pods["mlflow"], 22)


def test_traces_and_dashboards_leave_only_when_they_are_configured(chart: Path, helm4: charts.Helm4) -> None:
    release = Release(helm4.template(chart, {}))
    assert not release.allows("endpoint-endpoint", "collector", 4318)
    assert not release.allows("endpoint-head", "prometheus", 9090)


def test_every_pod_is_selected_by_default_deny(release: Release) -> None:
    (deny,) = [policy for policy in release.policies if policy["metadata"]["name"].endswith("default-deny")]
    assert deny["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in deny["spec"]
    for name, pod in release.pods.items():
        if pod["metadata"]["labels"].get("app.kubernetes.io/instance"):
            assert network.selects(deny["spec"]["podSelector"], pod["metadata"]["labels"]), name
