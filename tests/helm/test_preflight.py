"""Against a live cluster the chart looks before it makes anything: is the Secret there, with every key that this release reads?"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import charts, fake_kubernetes, releases
from support.charts import Values
from support.fake_kubernetes import Cluster
from support.matrix import MATRIX

SECRET = "altiplano-secrets"
CASES = ["default", "monitoring", "endpoint-only", "mlflow-only", "jobs-survive-heads"]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A stand-in of a cluster with the account that every namespace has."""
    with fake_kubernetes.serving() as cluster:
        _create(cluster, "serviceaccounts", {"kind": "ServiceAccount", "metadata": {"name": "default"}})
        yield cluster


def _create(cluster: Cluster, kind: str, body: dict[str, Any]) -> None:
    body = {"apiVersion": "v1", **body}
    body["metadata"]["namespace"] = charts.NAMESPACE
    cluster.create((kind, body["metadata"]["name"]), body, "test")


def _refusal(chart: Path, cluster: Cluster, values: Values) -> str:
    with pytest.raises(charts.RefusedError) as caught:
        releases.Releases4(chart, cluster).install(values)
    return str(caught.value)


def test_a_missing_secret_is_told_before_anything_is_made(chart: Path, cluster: Cluster) -> None:
    assert f'no Secret "{SECRET}" in namespace {charts.NAMESPACE}' in _refusal(chart, cluster, {})


@pytest.mark.parametrize("name", CASES)
def test_missing_keys_are_those_that_the_release_reads(chart: Path, helm4: charts.Helm4, cluster: Cluster, name: str) -> None:
    _create(cluster, "secrets", {"kind": "Secret", "metadata": {"name": SECRET}, "data": {"other": "eA=="}})
    (told,) = re.findall(rf'the Secret "{SECRET}" has no ([^:]+):', _refusal(chart, cluster, MATRIX[name]))
    assert set(told.split(", ")) == _read(helm4.template(chart, MATRIX[name]))


@pytest.mark.parametrize("major", ["helm3", "helm4"])
def test_what_is_there_is_not_missed(
    chart: Path, cluster: Cluster, major: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    data = {"api-keys.json": "e30=", "redis-password": "eA=="}
    _create(cluster, "secrets", {"kind": "Secret", "metadata": {"name": SECRET}, "data": data})
    release = (
        releases.Releases4(chart, cluster)
        if major == "helm4"
        else releases.Releases3(chart, cluster, request.getfixturevalue("helm3"), tmp_path)
    )
    with pytest.raises(charts.RefusedError, match="has no mlflow-admin-password, mlflow-flask-secret-key, postgres-password:"):
        release.install({})
    assert "rayservices" not in {kind for kind, _ in cluster.objects}


def test_a_release_that_reads_no_key_needs_no_secret(chart: Path, cluster: Cluster) -> None:
    values: Values = {"mlflow": {"enabled": False}, "endpoint": {"enabled": False}, "networkPolicy": {"enabled": False}}
    releases.Releases4(chart, cluster).install(values)
    assert cluster.get("rayclusters", "trial-altiplano-jobs")


def _read(found: Any) -> set[str]:
    """Keys of the Secret that objects name: in variables, volumes and scrapes."""
    if isinstance(found, list):
        return {key for item in found for key in _read(item)}
    if not isinstance(found, dict):
        return set()
    if "raycluster.json" in found:
        return _read(json.loads(found["raycluster.json"]))
    own = {found["key"]} if found.get("name") == SECRET and "key" in found else set()
    if found.get("secretName") == SECRET:
        own = {item["key"] for item in found["items"]}
    return own | {key for value in found.values() for key in _read(value)}
