"""Alerts fire when they should, dashboards and rules use metrics that exist, and every alert has a runbook."""

import inspect
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from support import charts, pods
from support.charts import ROOT, Object, merged
from support.matrix import MATRIX

from altiplano.serve import cost, gpu_metrics
from altiplano.serve.metrics import Labels, Metrics

METRIC = re.compile(r"\b((?:altiplano|ray|kube)_[a-z0-9_]+)\b(?=\s*[{\[,)]|$|\s)")
# kube-state-metrics, by its documentation: https://github.com/kubernetes/kube-state-metrics/blob/main/docs/metrics/workload/cronjob-metrics.md
OTHERS = {"kube_cronjob_status_last_successful_time"}


@pytest.fixture(scope="module")
def objects(chart: Path, helm4: charts.Helm4) -> list[Object]:
    """A release with all of monitoring."""
    return helm4.template(chart, MATRIX["monitoring"])


@pytest.fixture(scope="module")
def rules(objects: list[Object]) -> list[dict[str, Any]]:
    """Every alert."""
    (resource,) = charts.of_kind(objects, "PrometheusRule")
    return [rule for group in resource["spec"]["groups"] for rule in group["rules"]]


@pytest.fixture(scope="module")
def promtool() -> str:
    """Prometheus' own checker of rules."""
    fetched = ROOT / ".venv" / "tools" / "prometheus" / "usr" / "bin" / "promtool"
    found = os.environ.get("PROMTOOL") or shutil.which("promtool") or (str(fetched) if fetched.exists() else None)
    if found is None:
        pytest.skip("no promtool: `make test-helm` fetches it, or set PROMTOOL to the binary")
    return found


def test_alerts_fire_and_are_silent_as_told(
    objects: list[Object], rules: list[dict[str, Any]], promtool: str, tmp_path: Path
) -> None:
    (resource,) = charts.of_kind(objects, "PrometheusRule")
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(resource["spec"]))
    stories = (Path(__file__).parent / "alerts.yaml").read_text()
    (tmp_path / "alerts.yaml").write_text(
        stories.replace("RUNBOOKS", "https://github.com/altiplano/altiplano/blob/main/docs/runbooks")
    )
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", "alerts.yaml"]):
        done = subprocess.run([promtool, *command], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    fired = {
        test["alertname"] for story in yaml.safe_load(stories)["tests"] for test in story["alert_rule_test"] if test["exp_alerts"]
    }
    assert fired == {rule["alert"] for rule in rules}, "every alert fires in a story"


def test_every_alert_has_a_runbook(rules: list[dict[str, Any]]) -> None:
    written = {path.name for path in (ROOT / "docs" / "runbooks").glob("altiplano*.md")}
    assert {rule["annotations"]["runbook_url"].rsplit("/", 1)[-1] for rule in rules} == written
    for name in written:
        text = (ROOT / "docs" / "runbooks" / name).read_text()
        assert all(f"## {heading}" in text for heading in ("What it means", "Look", "Do")), name


def _exported() -> set[str]:
    """Names of all samples that the endpoint writes."""
    metrics = Metrics()
    metrics.of(Labels("m", "a", "k")).finished("stop")
    text = metrics.render().decode()
    names = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)) | set(re.findall(r"^([a-z_]+)[{ ]", text, re.MULTILINE))
    buckets = {f"{name}_bucket" for name in re.findall(r"^# TYPE (\S+) histogram", text, re.MULTILINE)}
    # These two need a price and a GPU before they have samples.
    sources = "".join(inspect.getsource(module) for module in (cost, gpu_metrics))
    counters = {f"{name}_total" for name in re.findall(r'CounterMetricFamily\("(\w+)"', sources)}
    return names | buckets | counters | set(re.findall(r'GaugeMetricFamily\("(\w+)"', sources))


def _of_ray() -> set[str]:
    """Names that Ray's own dashboards use: what this Ray exports."""
    folder = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    return {
        name
        for path in folder.iterdir()
        if path.suffix in (".py", ".json")
        for name in re.findall(r"ray_[a-z0-9_]+", path.read_text())
    }


def test_only_metrics_that_exist_are_used(objects: list[Object], rules: list[dict[str, Any]]) -> None:
    dashboards = [
        json.loads(text)
        for o in charts.of_kind(objects, "ConfigMap")
        if "dashboard" in o["metadata"]["name"]
        for text in o["data"].values()
    ]
    assert len(dashboards) == 4
    expressions = [rule["expr"] for rule in rules]
    expressions += [target["expr"] for dashboard in dashboards for panel in dashboard["panels"] for target in panel["targets"]]
    labels = {"ray_io_cluster", "ray_train_run_name"}
    used = {name for expression in expressions for name in METRIC.findall(expression)} - labels
    assert len(used) > 30
    assert used - _exported() - _of_ray() - OTHERS == set()


def test_dashboards_are_whole(objects: list[Object]) -> None:
    uids = set()
    for config in (o for o in charts.of_kind(objects, "ConfigMap") if "dashboard" in o["metadata"]["name"]):
        assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
        (dashboard,) = (json.loads(text) for text in config["data"].values())
        uids.add(dashboard["uid"])
        assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
        for panel in dashboard["panels"]:
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    assert len(uids) == 4


def test_dashboards_are_valid_promql(objects: list[Object], promtool: str, tmp_path: Path) -> None:
    """Every panel's expression, as a recording rule."""
    recorded: list[dict[str, str]] = []
    for config in (o for o in charts.of_kind(objects, "ConfigMap") if "dashboard" in o["metadata"]["name"]):
        (dashboard,) = (json.loads(text) for text in config["data"].values())
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                expression = target["expr"].replace("$__rate_interval", "5m").replace("$namespace", "llamas")
                recorded.append({"record": f"panel:{len(recorded)}", "expr": expression})
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": recorded}]}))
    done = subprocess.run(
        [promtool, "check", "rules", "panels.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_pod_monitors_find_ports(objects: list[Object]) -> None:
    made = pods.pods([*objects, charts.ray_cluster(objects)])
    for monitor in charts.of_kind(objects, "PodMonitor"):
        assert monitor["metadata"]["labels"]["release"] == "kube-prometheus-stack"
        selector = monitor["spec"]["selector"]
        chosen = [
            pod
            for pod in made
            if selector["matchLabels"].items() <= pod["metadata"]["labels"].items()
            and "ray.io/node-type" in pod["metadata"]["labels"]
        ]
        ports = {port["name"] for pod in chosen for container in pods.containers(pod) for port in container["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= ports


def test_each_replica_is_scraped_where_it_shows_its_metrics(chart: Path, helm4: charts.Helm4) -> None:
    """Through the proxy's port Prometheus would read another replica each time."""
    objects = helm4.template(chart, merged(MATRIX["monitoring"], {"endpoint": {"metricsPort": 9700}}))
    (monitor,) = [o for o in charts.of_kind(objects, "PodMonitor") if o["metadata"]["name"].endswith("-endpoint")]
    (scraped,) = monitor["spec"]["podMetricsEndpoints"]
    (service,) = charts.of_kind(objects, "RayService")
    _, worker = pods.pods([service])
    ports = {port["name"]: port["containerPort"] for port in pods.containers(worker)[0]["ports"]}
    (application,) = yaml.load(service["spec"]["serveConfigV2"], yaml.CSafeLoader)["applications"]
    assert ports[scraped["port"]] == application["args"]["metrics_port"] == 9700
    assert application["deployments"][0]["max_replicas_per_node"] == 1, "a second replica would be at the next port"
    assert scraped["authorization"]["credentials"] == {"name": "altiplano-secrets", "key": "metrics-api-key"}
