"""`cluster install` with a real Helm, and the plan before it: what each change of values does to what runs."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import Ran
from stand_in import FullCluster
from support import charts
from support.charts import NAMESPACE, Values

from altiplano.cluster.diff import Effect, plan_all

SMALL = {"requests": {"cpu": "1", "memory": "8Gi"}, "limits": {"cpu": "1", "memory": "8Gi"}}
Altiplano = Callable[..., Ran]


@pytest.fixture(scope="module")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return charts.working_copy(tmp_path_factory.mktemp("chart"))


@pytest.fixture
def helm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Helm 3, with a home of its own."""
    found = charts.Helm3.find()
    if found is None:
        pytest.skip("no Helm 3: `make test-helm` fetches it, or set HELM3 to the binary")
    monkeypatch.setenv("HOME", str(tmp_path))
    return os.fspath(found.binary)


@pytest.mark.parametrize(
    ("change", "object_", "effect"),
    [
        ({"endpoint": {"adapters": {"a": "/workspace/a"}}}, "RayService", Effect.in_place),
        ({"endpoint": {"engine": {"max_model_len": 4096}}}, "RayService", Effect.rolls),
        ({"image": {"tag": "0.2.0"}}, "RayService", Effect.new_cluster),
        ({"image": {"tag": "0.2.0"}}, "RayCluster", Effect.new_pods),
        ({"image": {"tag": "0.2.0"}}, "Deployment", Effect.restarts),
        ({"rayCluster": {"workerGroups": {"training": {"maxReplicas": 9}}}}, "RayCluster", Effect.in_place),
        (
            {"rayCluster": {"workerGroups": {"more": {"minReplicas": 0, "maxReplicas": 1, "resources": SMALL}}}},
            "RayCluster",
            Effect.in_place,
        ),
        ({"endpoint": {"upgradeStrategy": "None"}, "hubOffline": True}, "RayService", Effect.not_taken),
        ({"endpoint": {"enabled": False}}, "RayService", Effect.removed),
        ({"monitoring": {"podMonitor": {"enabled": True}}}, "PodMonitor", Effect.created),
    ],
)
def test_the_plan_says_what_a_change_does(chart: Path, change: Values, object_: str, effect: Effect) -> None:
    helm4 = charts.Helm4()
    plans = plan_all(helm4.template(chart, {}), helm4.template(chart, change))
    held = {"RayCluster": "ConfigMap"}.get(object_, object_)
    found = [plan for plan in plans if plan.kind == held]
    assert any(effect in plan.effects for plan in found), plans
    assert plan_all(helm4.template(chart, change), helm4.template(chart, change)) == []


def test_a_release_is_planned_installed_and_changed(
    empty: FullCluster, altiplano: Altiplano, chart: Path, helm: str, tmp_path: Path
) -> None:
    values = tmp_path / "my-values.yaml"
    values.write_text(
        yaml.safe_dump({"preflight": False, "rayCluster": {"apply": "helm"}, "endpoint": {"gcsFaultTolerance": False}})
    )
    words = ("cluster", "install", "--helm", helm, "--chart", str(chart), "-f", str(values))
    planned = altiplano(*words, "--dry-run")
    assert planned.code == 0, planned.err
    assert "created" in planned.out and "RayService trial-altiplano-endpoint" in planned.out
    assert f"upgrade --install trial {chart} --timeout 10m --namespace {NAMESPACE}" in " ".join(planned.out.split())
    elsewhere = altiplano(*words, "--dry-run", "-n", "elsewhere")
    assert "--create-namespace" in elsewhere.out and "--create-namespace" not in planned.out
    assert empty.objects == {}, "a dry run makes nothing"
    assert altiplano(*words).code == 2, "nobody can answer here"
    assert altiplano(*words, "-y").code == 0
    assert empty.get("rayclusters", "trial-altiplano-jobs")["metadata"]["namespace"] == NAMESPACE
    changed = json.loads(altiplano(*words, "--set", "endpoint.engine.max_model_len=4096", "--dry-run", "-o", "json").out)
    (plan,) = changed["changes"]
    assert (plan["kind"], [change["effect"] for change in plan["changes"]]) == ("RayService", [Effect.rolls])
    assert "max_model_len" in plan["changes"][0]["path"]
    assert "nothing would change" in altiplano(*words, "--dry-run").out


def test_what_helm_refuses_is_said_once(empty: FullCluster, altiplano: Altiplano, chart: Path, helm: str) -> None:
    words = ("cluster", "install", "--helm", helm, "--chart", str(chart))
    wrong = altiplano(*words, "--set", "endpoint.replicas.minimum=3")
    assert wrong.code == 1 and "minimum" in wrong.err and "Traceback" not in wrong.err
    absent = altiplano(*words, "-f", "absent.yaml")
    assert absent.code == 2 and "values-gpu.yaml" in absent.err
    none = altiplano("cluster", "install", "--helm", "no-such-helm")
    assert none.code == 2 and "Helm 3 or 4" in none.err
