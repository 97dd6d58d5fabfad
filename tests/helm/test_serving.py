"""The chart's endpoint is the one that our code deploys: for the same settings, serveConfigV2 and the pods say what serve_config says."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import charts, pods, serving
from support.charts import Object
from support.matrix import MATRIX

from altiplano import spec
from altiplano.serve.application import parse
from altiplano.serve.settings import ServeSettings

WITH_ENDPOINT = [name for name in MATRIX if name not in ("jobs-survive-heads", "jobs-only", "mlflow-only")]


@pytest.fixture(scope="module", params=WITH_ENDPOINT)
def case(request: pytest.FixtureRequest, chart: Path, helm4: charts.Helm4) -> tuple[dict[str, Any], Object]:
    """The endpoint's values and its RayService."""
    values = MATRIX[request.param]
    (service,) = charts.of_kind(helm4.template(chart, values), "RayService")
    return serving.endpoint_values(chart, values), service


def test_the_deployments_options_are_the_generated_ones(case: tuple[dict[str, Any], Object]) -> None:
    values, service = case
    said, made = _config(service), serving.generated(values)
    assert said["proxy_location"] == made["proxy_location"]
    assert said["http_options"] == made["http_options"]
    (mine,), (theirs,) = said["applications"], made["applications"]
    for field in ("name", "route_prefix", "import_path"):
        assert mine[field] == theirs[field], field
    (my_deployment,), (their_deployment,) = mine["deployments"], theirs["deployments"]
    assert my_deployment.pop("max_replicas_per_node") == 1
    assert my_deployment["ray_actor_options"].keys() == their_deployment["ray_actor_options"].keys()
    for field in serving.OF_THE_PLACE:
        my_deployment.pop(field, None)
        their_deployment.pop(field, None)
    assert my_deployment == their_deployment


def test_replicas_are_started_with_the_generated_settings(case: tuple[dict[str, Any], Object]) -> None:
    """By the code that a replica runs; the model is cria because weights of the hub are not here."""
    values, service = case
    (mine,), (theirs,) = _config(service)["applications"], serving.generated(values)["applications"]
    assert parse(mine["args"] | {"model": "cria"}) == parse(theirs["args"] | {"model": "cria"})
    assert mine["args"]["model"] == theirs["args"]["model"]


def test_serves_processes_find_the_generated_environment(case: tuple[dict[str, Any], Object]) -> None:
    values, service = case
    made = serving.generated_environment(values)
    assert "RAY_SERVE_ENABLE_HA_PROXY" in made
    for pod in pods.pods([service]):
        said = {v["name"]: v.get("value") for v in pods.containers(pod)[0]["env"]}
        assert {name: value for name, value in said.items() if name.startswith("RAY_SERVE_")} == made


def test_every_setting_of_the_endpoint_can_be_given(chart: Path) -> None:
    """A field that the pipeline file gains has to be named here: passed by the chart, or decided by the place."""
    decided = {"enabled", "host", "port", "engine", "remote"}
    schema = json.loads((chart / "values.schema.json").read_text())["properties"]["endpoint"]["properties"]
    engine = schema["engine"]["properties"].keys()
    passed = {
        "limits": "limits",
        "response_cache_bytes": "responseCacheBytes",
        "usd_per_hour": "usdPerHour",
        "otlp_endpoint": "otlpEndpoint",
        "metrics_port": "metricsPort",
        "http_proxy": "haProxy",
        "routing": "routing",
        "api_keys_file": "apiKeys",
        "autoscaling": "replicas",
        "graceful_shutdown_timeout_s": "gracefulShutdownTimeoutSeconds",
        "health_check_timeout_s": "healthCheckTimeoutSeconds",
    }
    assert set(passed.values()) <= schema.keys()
    assert spec.Serve.model_fields.keys() - decided - passed.keys() <= engine
    assert schema["limits"]["properties"].keys() == spec.ServeLimits.model_fields.keys()
    assert engine == ServeSettings.__dataclass_fields__.keys() - {"model_path", "served_model_name", "adapters", "aliases"}


def test_the_tuned_case_leaves_no_default(chart: Path) -> None:
    """Equal because both sides took the default would prove nothing: one case changes every setting."""
    before = serving.endpoint_values(chart, {})
    after = serving.endpoint_values(chart, MATRIX["tuned-endpoint"])
    kept = {
        "enabled", "model", "importPath", "adapters", "aliases", "apiKeys", "maxOngoingRequests", "maxQueuedRequests", "gpusPerReplica",
        "haProxy", "upgradeStrategy", "incrementalUpgrade", "rayClusterDeletionDelaySeconds", "autoscaling", "auth", "gcsFaultTolerance",
        "head", "worker", "extraSpec", "extraClusterSpec",
    }  # fmt: skip
    assert {name for name in before if before[name] == after[name]} == kept
    assert {name for name in before["engine"] if before["engine"][name] == after["engine"][name]} == {
        "device",
        "dtype",
        "max_model_len",
    }
    assert after["limits"].keys() == spec.ServeLimits.model_fields.keys()


def test_bounds_of_serve_may_be_given(chart: Path, helm4: charts.Helm4) -> None:
    objects = helm4.template(chart, {"endpoint": {"maxOngoingRequests": 7, "maxQueuedRequests": 0}})
    (deployment,) = _config(charts.of_kind(objects, "RayService")[0])["applications"][0]["deployments"]
    assert (deployment["max_ongoing_requests"], deployment["max_queued_requests"]) == (7, 0)


def test_a_former_cluster_stays_as_long_as_its_streams(case: tuple[dict[str, Any], Object]) -> None:
    values, service = case
    assert service["spec"]["rayClusterDeletionDelaySeconds"] >= values["gracefulShutdownTimeoutSeconds"]


def _config(service: Object) -> dict[str, Any]:
    config: dict[str, Any] = copy.deepcopy(yaml.load(service["spec"]["serveConfigV2"], yaml.CSafeLoader))
    return config
